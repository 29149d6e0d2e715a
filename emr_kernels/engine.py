"""Chooses, for one model and one input, between the linearized program and double backward."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from emr_kernels.fallback import squared_norms
from emr_kernels.function import PenaltyFunction, Request, evaluate
from emr_kernels.graphed import GraphCache
from emr_kernels.linearize.cache import find_program, mode_difference
from emr_kernels.linearize.export import UnsupportedModelError
from emr_kernels.linearize.program import Program
from emr_kernels.linearize.wrappers import ordinary
from emr_kernels.options import PenaltyOptions
from emr_kernels.shared import LogitsAndPenalty


@dataclass
class Engine:
    """How the penalty of one model is computed.

    Attributes:
        program: the linearized classifier, or None for double backward.
        reason: why there is no program.
        num_classes: C.
    """

    program: Program | None
    reason: str | None
    num_classes: int

    def penalty(
        self,
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor | None,
        options: PenaltyOptions,
        factor: float | None,
        graphs: GraphCache | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """factor · Σ_i r_i (or r `[N]` for None), and per-sample norms by layer.

        `model` is the unwrapped module; `graphs` captures the passes as CUDA graphs.
        """
        x = ordinary(x)
        if self.program is None:
            squares, norms = squared_norms(model, x, y, options)
            return (squares if factor is None else squares.sum() * factor), norms
        values = self.program.bind(model, x.shape[0])
        leaves = self.program.leaves(values)
        request = Request(self.program, values, options, y, factor, graphs)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *leaves)):
            value = PenaltyFunction.apply(request, x, *leaves)  # type: ignore[no-untyped-call]
        else:
            squares = evaluate(request, x)
            value = squares if factor is None else squares.sum() * factor
        return value, request.norms

    def shares_forward(self, model: nn.Module, x: torch.Tensor) -> bool:
        """Whether one forward serves a loss on the logits and the penalty: the model is the same function in both."""
        if self.program is None or not any(t.requires_grad for t in (x, *model.parameters())):
            return False
        return mode_difference(model, self.program, x) is None

    def logits_and_penalty(
        self, model: nn.Module, x: torch.Tensor, y: torch.Tensor | None, options: PenaltyOptions, factor: float
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The logits, factor · Σ_i r_i and per-sample norms by layer, where `shares_forward` is true."""
        assert self.program is not None
        x = ordinary(x)
        values = self.program.bind(model, x.shape[0])
        request = Request(self.program, values, options, y, factor)
        logits, value = LogitsAndPenalty.apply(request, x, *self.program.leaves(values))  # type: ignore[no-untyped-call]
        return logits, value, request.norms


def find_engine(model: nn.Module, x: torch.Tensor, layers: tuple[str, ...]) -> Engine:
    """The engine for this model and this kind of input; exports the model if that has not happened yet.

    Args:
        model: the unwrapped module.

    Raises:
        TypeError, ValueError: if the model cannot process x at all, or does not return logits `[N, C]`.
    """
    try:
        program = find_program(model, x, layers)
    except UnsupportedModelError as error:
        return Engine(None, str(error), error.num_classes)
    return Engine(program, None, program.graph.num_classes)


def warn_fallback(reason: str | None) -> None:
    """Say once, to the user's own line, that the slow way is taken and why."""
    warnings.warn(
        f"the effective weight penalty falls back to double backward: {reason}. "
        "Results are exact, but slower and larger in memory.",
        RuntimeWarning,
        stacklevel=4,
    )
