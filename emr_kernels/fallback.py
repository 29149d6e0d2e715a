"""The penalty by double backward on the live model: exact wherever autograd is, slower, and larger in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from emr_kernels.checks import check_logits
from emr_kernels.directions import seeds
from emr_kernels.linearize.cache import INPUT
from emr_kernels.linearize.verify import live_evaluation, untouched_forward
from emr_kernels.linearize.wrappers import ordinary
from emr_kernels.options import PenaltyOptions


def squared_norms(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor | None, options: PenaltyOptions
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Per-sample ‖w‖², summed over layers and class mixes, differentiable if gradients are on.

    Returns:
        `[N]`, and the norms by layer, `[N]` each, detached.
    """
    wants_gradient = torch.is_grad_enabled()
    with live_evaluation(model):
        source = x if x.requires_grad else ordinary(x).detach().requires_grad_()
        with _captured(model, [layer for layer in options.layers if layer != INPUT]) as inputs:
            logits = untouched_forward(model, source)
        check_logits(logits, x.shape[0])
        taps = [source if layer == INPUT else inputs[layer] for layer in options.layers]
        rows: list[Any] = [0] * len(taps)
        mixes = seeds(logits, y, options.direction, options.temperature, options.center)
        if options.moves:
            assert y is not None
            mixes = iter([logits.softmax(1) - torch.nn.functional.one_hot(y, logits.shape[1])])
        for seed in mixes:
            weights = torch.autograd.grad(
                logits,
                taps,
                seed.to(logits.dtype),
                create_graph=wants_gradient,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for place, weight in enumerate(weights):
                if weight.shape[0] % x.shape[0]:
                    layer = options.layers[place]
                    raise ValueError(f"layers: {layer!r} takes {tuple(weight.shape)}; expected the batch first")
                wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
                rows[place] = rows[place] + wide.reshape(x.shape[0], -1).square().sum(1)
    norms = {layer: row.detach().sqrt() for layer, row in zip(options.layers, rows, strict=True)}
    total: torch.Tensor = torch.stack(rows).sum(0)
    return (total if wants_gradient else total.detach()), norms


@contextmanager
def _captured(model: nn.Module, layers: list[str]) -> Iterator[dict[str, torch.Tensor]]:
    """The input tensors of these modules, filled in by the next forward."""
    inputs: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    hooks = []
    for layer in layers:
        if layer not in modules:
            raise ValueError(f"layers: {layer!r} is not a module of the model; expected 'input' or one of its modules")

        def keep(module: nn.Module, args: tuple[Any, ...], layer: str = layer) -> Any:
            inputs[layer] = args[0]
            # A copy, because the module may write into its input.
            return (args[0].clone(), *args[1:])

        hooks.append(modules[layer].register_forward_pre_hook(keep))
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
