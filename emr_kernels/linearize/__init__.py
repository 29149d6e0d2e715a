"""`linearize`: a classifier as an explicit linear map at every input, with vjp and jvp."""

from __future__ import annotations

import torch
from torch import nn

from emr_kernels.checks import check_input
from emr_kernels.linearize.cache import find_program, forget
from emr_kernels.linearize.chain import Chain, find_chain
from emr_kernels.linearize.export import UnsupportedModelError
from emr_kernels.linearize.point import Point
from emr_kernels.linearize.program import Program
from emr_kernels.linearize.wrappers import unwrap

__all__ = ["Linearization", "LinearizedPoint", "UnsupportedModelError", "forget", "linearize"]


class LinearizedPoint:
    """The Jacobian of the evaluation-mode classifier at one batch, as two linear maps.

    Attributes:
        logits: `[N, C]`, detached.
    """

    def __init__(self, program: Program, point: Point, x: torch.Tensor) -> None:
        self._program = program
        self._point = point
        self._shape = x.shape
        self._dtype = x.dtype
        self.logits = point.logits

    @classmethod
    def at(cls, program: Program, model: nn.Module, x: torch.Tensor) -> LinearizedPoint:
        """Run the forward of the unwrapped `model` at x."""
        with torch.no_grad():
            values = program.bind(model, x.shape[0])
            plan = program.plan((False,) * len(program.graph.leaves))
            return cls(program, program.forward(values, x, plan), x)

    def chain(self) -> Chain | None:
        """The Jacobian of a multilayer perceptron as one product, for many classes at once; None for other models."""
        return find_chain(self._program, self._point, self._shape)

    def vjp(self, seed: torch.Tensor) -> torch.Tensor:
        """∂(Σ seed · logits)/∂x: each sample's effective weight of the class mix `seed`.

        Args:
            seed: `[N, C]`.

        Returns:
            `[N, *input]`, in x's dtype.

        Raises:
            ValueError: if the seed's shape is not that of the logits.
        """
        if seed.shape != self.logits.shape:
            raise ValueError(f"seed has shape {tuple(seed.shape)}; expected {tuple(self.logits.shape)}")
        (weight,), _ = self._program.vjp(self._point, seed, keep=False)
        if weight is None:
            return torch.zeros(self._shape, dtype=self._dtype, device=seed.device)
        return weight.to(self._dtype)

    def jvp(self, tangent: torch.Tensor) -> torch.Tensor:
        """The logits' derivative along `tangent`.

        Args:
            tangent: `[N, *input]`.

        Returns:
            `[N, C]`.

        Raises:
            ValueError: if the tangent's shape is not that of x.
        """
        if tangent.shape != self._shape:
            raise ValueError(f"tangent has shape {tuple(tangent.shape)}; expected {tuple(self._shape)}")
        out = self._program.jvp(self._point, [tangent])
        return torch.zeros_like(self.logits) if out is None else out


class Linearization:
    """A classifier whose forward was exported once; call it to linearize at a batch.

    Parameters and buffers are read from the live model at every call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: torch.Tensor) -> LinearizedPoint:
        """Run the evaluation-mode forward on x `[N, ...]` and keep what its derivatives need.

        Raises:
            UnsupportedModelError: if the model cannot be linearized exactly.
        """
        model = unwrap(self.model)
        check_input(model, x)
        return LinearizedPoint.at(find_program(model, x), model, x)


def linearize(model: nn.Module, example: torch.Tensor) -> Linearization:
    """Export the evaluation-mode forward of `model` and check it against autograd.

    Args:
        model: a classifier that maps `[N, ...]` to logits `[N, C]`. It is not changed; wrappers (`torch.compile`,
            DDP, DataParallel, Fabric) are looked through.
        example: a batch as the model takes it; with N >= 2 the result serves every batch size above 1, too.

    Returns:
        A callable from x to a point with `logits`, `vjp` and `jvp`.

    Raises:
        UnsupportedModelError: if the model cannot be exported, or its exported derivatives would not be exact.
        TypeError, ValueError: for an example that is not a floating-point batch.
    """
    inner = unwrap(model)
    check_input(inner, example)
    find_program(inner, example)
    return Linearization(model)
