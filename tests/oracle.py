"""The oracle: the effective weight penalty and its gradients by plain double backward.

Nothing here is shared with the library under test. Per sample r_i = sum over layers of ||d s / d h_l||^2 with
s = sum_i seed_i . f(x_i), the seed held constant, every module in evaluation mode (Liu & Chan, BMVC 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Relative errors allowed against the float64 oracle, each with its reason.
TOLERANCES = {
    # Both sides do the same sums in another order: about 1e3 roundings of 1.1e-16, three digits to spare.
    torch.float64: 1e-10,
    # Unit roundoff 6e-8 times the depth of the net; a unit within roundoff of its kink may switch.
    torch.float32: 1e-4,
    # Unit roundoff 4.9e-4, and switched units; a bound on the median over the parameters.
    torch.float16: 1e-2,
    # Unit roundoff 3.9e-3, eight times float16's; a bound on the median over the parameters.
    torch.bfloat16: 5e-2,
}
# A gradient that vanishes by cancellation (an attention key's bias) is all rounding: it is measured against
# this fraction of the largest gradient instead of against itself.
VANISHING = 1e-5


@dataclass(frozen=True)
class Reference:
    """What double backward gives: value, r [N], norms per layer [N], gradients by name, dR/dx."""

    value: Tensor
    per_sample: Tensor
    norms: dict[str, Tensor]
    grads: dict[str, Tensor | None]
    grad_x: Tensor
    logits: Tensor


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Clear ``training`` module by module, as ``eval`` may be overridden; restore it after."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def captured_inputs(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the first positional argument of each named module during the next forward."""
    captured: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            captured[name] = args[0]

        return hook

    handles = [modules[n].register_forward_pre_hook(hook_for(n)) for n in layers if n != "input"]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def seeds(logits: Tensor, y: Tensor | None, temperature: float, direction: str, center: bool) -> list[Tensor]:
    """The class mixes [N, C] whose effective weights are squared and summed; constants for autograd."""
    z = logits.detach()
    if direction == "softmax":
        mixes = [torch.softmax(z / temperature, dim=1)]
    elif direction == "all":
        mixes = [row.expand_as(z) for row in torch.eye(z.shape[1], dtype=z.dtype, device=z.device)]
    else:
        assert y is not None
        onehot = F.one_hot(y, z.shape[1]).to(z.dtype)
        rival = z.masked_fill(onehot.bool(), float("-inf")).argmax(dim=1)
        mixes = [onehot if direction == "label" else onehot - F.one_hot(rival, z.shape[1]).to(z.dtype)]
    return [mix - mix.mean(dim=1, keepdim=True) for mix in mixes] if center else mixes


def reduce(r: Tensor, reduction: str, batch_size: int | None = None) -> Tensor:
    if reduction == "none":
        return r
    if reduction == "paper":
        return r.mean() / (batch_size or len(r))
    return r.mean() if reduction == "mean" else r.sum()


def per_sample_penalty(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    temperature: float = 40.0,
    direction: str = "softmax",
    layers: Sequence[str] = ("input",),
    center: bool = False,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """r [N] with its graph, the squared norms per layer [N], and the logits; x must require grad."""
    with sdpa_kernel(SDPBackend.MATH), evaluation_mode(model), captured_inputs(model, layers) as captured:
        logits = model(x)
        points = [x if name == "input" else captured[name] for name in layers]
        squares = {name: logits.new_zeros(len(x)) for name in layers}
        if direction == "cross_entropy":
            scalars = [F.cross_entropy(logits, y, reduction="sum")]
        else:
            scalars = [(seed * logits).sum() for seed in seeds(logits, y, temperature, direction, center)]
        for scalar in scalars:
            cotangents = torch.autograd.grad(scalar, points, create_graph=True)
            for name, g in zip(layers, cotangents, strict=True):
                squares[name] = squares[name] + g.reshape(len(g), -1).square().sum(dim=1)
        return torch.stack(list(squares.values())).sum(dim=0), squares, logits


def double_backward(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    reduction: str = "paper",
    batch_size: int | None = None,
    strength: float = 1.0,
    base_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    weights: Tensor | None = None,
    **options: object,
) -> Reference:
    """Value and gradients of ``strength * penalty``, plus ``base_loss`` of a forward in the own mode.

    ``weights`` [N] contracts the unreduced penalty of ``reduction="none"`` to a scalar.
    """
    x = x.detach().clone().requires_grad_()
    total = x.new_zeros(())
    if base_loss is not None:
        assert y is not None
        total = total + base_loss(model(x), y)
    r, squares, logits = per_sample_penalty(model, x, y, **options)  # type: ignore[arg-type]
    value = reduce(r, reduction, batch_size)
    total = total + strength * ((value * weights).sum() if weights is not None else value.sum())
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inputs = [x] + [p for _, p in named]
    with sdpa_kernel(SDPBackend.MATH):
        nothing = (None,) * len(inputs)
        grads = torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else nothing
    return Reference(
        value=value.detach() if base_loss is None else total.detach(),
        per_sample=r.detach(),
        norms={name: square.detach().sqrt() for name, square in squares.items()},
        grads={name: g for (name, _), g in zip(named, grads[1:], strict=True)},
        grad_x=torch.zeros_like(x) if grads[0] is None else grads[0],
        logits=logits.detach(),
    )


def relative_error(a: Tensor | None, b: Tensor | None, floor: float = 0.0) -> float:
    """||a - b|| / max(||b||, floor); a missing gradient counts as zero, and 0 / 0 as 0. NaN stays NaN."""
    if a is None and b is None:
        return 0.0
    reference = torch.zeros_like(a) if b is None else b  # type: ignore[arg-type]
    actual = torch.zeros_like(reference) if a is None else a
    assert actual.shape == reference.shape, f"shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    error = (actual.double() - reference.double()).norm().item()
    scale = max(reference.double().norm().item(), floor)
    return error / scale if scale > 0 else (0.0 if error == 0 else float("inf") if error == error else error)


def errors(actual: Mapping[str, Tensor | None], reference: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Relative error per parameter name; see VANISHING."""
    assert actual.keys() == reference.keys()
    largest = max((g.norm().item() for g in reference.values() if g is not None), default=0.0)
    return {name: relative_error(actual[name], g, VANISHING * largest) for name, g in reference.items()}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """The accumulated ``.grad`` of every parameter that requires one, by name."""
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_gradients_match(
    model: nn.Module, reference: Mapping[str, Tensor | None], tolerance: float = TOLERANCES[torch.float64]
) -> None:
    """Every ``.grad`` of the model equals the reference, per parameter, within the relative tolerance."""
    found = errors(gradients(model), reference)
    wrong = {name: error for name, error in found.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance:g}: " + ", ".join(f"{n}: {e:.2e}" for n, e in wrong.items())
