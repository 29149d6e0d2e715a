"""Multilayer perceptrons: the effective weights of many classes at once, as one product behind all ReLUs.

Where the way from x to the logits is a chain of linear layers, (leaky) ReLUs, and affine maps and reshapes that are the
same for all samples, the cotangents of all classes start from the rows of one matrix, and the bits of a ReLU serve
every class of a sample: `emr_kernels.ops.masked_chain`. Other graphs have no chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from emr_kernels import ops
from emr_kernels.linearize.graph import Graph
from emr_kernels.linearize.point import Point
from emr_kernels.linearize.program import Program
from emr_kernels.linearize.rules import GenericRule
from emr_kernels.linearize.rules.activations import HardtanhRule, ReluRule
from emr_kernels.linearize.rules.arithmetic import NegationRule, ProductRule, QuotientRule, SumOfTwoRule
from emr_kernels.linearize.rules.convolution import LinearRule
from emr_kernels.linearize.rules.linear_maps import IdentityRule, ReshapeRule
from emr_kernels.linearize.rules.normalization import AffineReluRule, BatchNormRule
from emr_kernels.linearize.wrappers import ordinary_tensors

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PRECISIONS = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
# Elements of the largest tensor that a block of samples and rows makes on its way to norms.
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Chain:
    """The Jacobian at one batch as head · mask₁ · weight₁ · mask₂ · weight₂ …, from the logits to x.

    Attributes:
        head: `[C, H]`, the same for all samples: each class's cotangent of the last ReLU's output.
        bits, slopes: of each ReLU, from the last to the first.
        weights: `[H, D]`, what stands before each of these ReLUs.
        shape: of x, `[N, ...]`.
    """

    head: torch.Tensor
    bits: list[torch.Tensor]
    weights: list[torch.Tensor]
    slopes: list[float]
    shape: torch.Size

    def centered_head(self) -> torch.Tensor:
        """The rows for the class mixes e_c − 1/C."""
        wide = self.head.to(torch.promote_types(self.head.dtype, torch.float32))
        return (wide - wide.mean(0)).to(self.head.dtype)

    def carry_back(self, rows: torch.Tensor) -> torch.Tensor:
        """The effective weights `[N, K, *input]` of class mixes by their rows `[K, H]`, which all samples share."""
        with ordinary_tensors(), torch.no_grad():
            given = rows.expand(self.shape[0], -1, -1)
            found = ops.masked_chain(given, self.bits, self.weights, self.slopes, precision=self._precision())
        return found.view(*found.shape[:2], *self.shape[1:])

    def norms(self, rows: torch.Tensor, ord: float = 2) -> torch.Tensor:
        """‖·‖_ord of what `carry_back` gives for shared rows `[K, H]`: `[N, K]`, float32 (float64 for float64)."""
        batch = self.shape[0]
        return self._norms((batch, rows.shape[0]), lambda n, k: rows[k].expand(n.stop - n.start, -1, -1), ord)

    def difference_norms(self, y: torch.Tensor, others: torch.Tensor, ord: float = 2) -> torch.Tensor:
        """‖w_y − w_j‖_ord for each sample's class y `[N]` and its classes j `[N, K]`: as `norms`.

        The difference is taken at the logits: that of two classes' effective weights would cancel.
        """
        head = self.head
        return self._norms(tuple(others.shape), lambda n, k: head[y[n]][:, None] - head[others[n, k]], ord)

    def _norms(self, shape: tuple[int, ...], rows: Callable[[slice, slice], torch.Tensor], ord: float) -> torch.Tensor:
        """Block by block; for the 2-norm the effective weights are never written."""
        found = self.head.new_empty(shape, dtype=torch.promote_types(self.head.dtype, torch.float32))
        with ordinary_tensors(), torch.no_grad():
            for samples, places in self._blocks(*shape):
                bits = [self._bits_of(samples, link) for link in range(len(self.bits))]
                arguments = (rows(samples, places), bits, self.weights, self.slopes)
                if ord == 2:
                    norms = ops.masked_chain_sq_norms(*arguments, precision=self._precision()).sqrt_()
                else:
                    weights = ops.masked_chain(*arguments, precision=self._precision())
                    norms = torch.linalg.vector_norm(weights, ord, dim=2, dtype=found.dtype)
                found[samples, places] = norms
        return found

    def _bits_of(self, samples: slice, link: int) -> torch.Tensor:
        units = self.weights[link].shape[0]
        return self.bits[link][samples.start * units // 8 : -(-samples.stop * units // 8)]

    def _blocks(self, batch: int, rows: int) -> Iterator[tuple[slice, slice]]:
        """Blocks of samples, and of rows where even the fewest samples are too many."""
        widest = max([self.head.shape[1], *(weight.shape[1] for weight in self.weights)])
        # The bits of every eighth sample start a byte.
        size = max(_BLOCK // max(rows * widest, 1) // 8 * 8, 8)
        height = max(_BLOCK // (min(size, max(batch, 1)) * widest), 1)
        for first in range(0, batch, size):
            for row in range(0, rows, height):
                yield slice(first, min(first + size, batch)), slice(row, min(row + height, rows))

    def _precision(self) -> str:
        return _PRECISIONS[torch.get_float32_matmul_precision()] if self.head.is_cuda else "ieee"


def find_chain(program: Program, point: Point, shape: torch.Size) -> Chain | None:
    """The program's Jacobian at this point as a chain; None where it is none, or has no ReLU.

    Args:
        program: any taps; only the way from x to the logits counts.
        point: of a plan without wanted leaves.
        shape: of x.
    """
    if any(dtype is not None for dtype in point.operand_dtypes):
        return None  # autocast: values differ in dtype
    with ordinary_tensors(), torch.no_grad():
        walk = _Walk(program.graph, point)
        chain = walk.run(program, shape)
    if chain is None:
        return None
    operands = [chain.head, *chain.weights]
    alike = all(t.dtype == point.logits.dtype and t.device == point.logits.device for t in operands)
    return chain if alike and point.logits.dtype in _DTYPES else None


class _Walk:
    """From the logits back to x; since the last ReLU there is diag(scale) if matrix is None, else the matrix."""

    def __init__(self, graph: Graph, point: Point) -> None:
        self.shapes = graph.shapes
        self.point = point
        self.matrix: torch.Tensor | None = None
        self.scale: torch.Tensor | float | None = None
        self.matrices: list[torch.Tensor] = []
        self.bits: list[torch.Tensor] = []
        self.slopes: list[float] = []

    def run(self, program: Program, shape: torch.Size) -> Chain | None:
        makers = {rule.node.index: place for place, rule in enumerate(program.rules)}
        index = program.graph.output
        while index != program.graph.input:
            place = makers.get(index)
            if place is None:
                return None
            rule = program.rules[place]
            if len(rule.node.active) != 1 or not self._pass(rule, self.point.residuals[place]):
                return None
            index = rule.node.active[0]
        if self.matrix is None or not self.bits:
            return None
        head, *weights = [*self.matrices, self.matrix]
        return Chain(head, self.bits, weights, self.slopes, shape)

    def _pass(self, rule: Any, residual: Any) -> bool:
        """Carry the matrix back through one call; False where it cannot be."""
        kind = type(rule)
        before, after = (self._extents(index) for index in (rule.node.active[0], rule.node.index))
        if before is None or after is None:
            return False
        if kind is LinearRule:
            return len(before) == 1 and self._multiply(residual.weight)
        if before.numel() != after.numel():
            return False
        if kind in (ReshapeRule, IdentityRule):
            return True
        if before != after:
            return False
        if kind in (ReluRule, HardtanhRule):
            return self._mask(residual, rule.slope)
        if kind in (AffineReluRule, BatchNormRule):
            slope = rule.slope
            if slope is not None and not self._mask(residual, slope):
                return False
            scale = residual.affine.scale
            return self._rescale(scale.view(-1, *[1] * (len(after) - 1)), after)
        if kind is NegationRule:
            return self._rescale(-1.0, after)
        if kind is SumOfTwoRule:
            place = rule._places()[0]
            return self._rescale(rule._signs()[place], after)
        if kind is ProductRule:
            left = rule.node.is_active(0)
            return self._rescale(residual.right if left else residual.left, after)
        if kind is QuotientRule:
            return self._rescale(1 / residual[1], after)
        if kind is GenericRule and rule.node.target is torch.ops.aten.div.Tensor and rule.node.is_active(0):
            return self._rescale(1 / residual.values[rule.node.args[1].index], after)
        return False

    def _extents(self, index: int) -> torch.Size | None:
        """A value's shape without the batch."""
        shape = self.shapes.get(index, ())
        known = [extent for extent in shape[1:] if extent is not None]
        return torch.Size(known) if shape and len(known) == len(shape) - 1 else None

    def _multiply(self, weight: torch.Tensor) -> bool:
        if self.matrix is None:
            scale, self.scale = self.scale, None
            column = scale[:, None] if isinstance(scale, torch.Tensor) else scale
            self.matrix = weight if column is None else (column * weight).to(weight.dtype)
            return True
        if self.bits:
            return False  # two layers without a ReLU between: their product may be larger than both
        self.matrix = self.matrix @ weight
        return True

    def _mask(self, residual: Any, slope: float) -> bool:
        if self.matrix is None or residual.memory_format != torch.contiguous_format:
            return False
        self.matrices.append(self.matrix)
        self.bits.append(residual.bits)
        self.slopes.append(slope)
        self.matrix = None
        return True

    def _rescale(self, factor: torch.Tensor | float, extents: torch.Size) -> bool:
        """Multiply by a factor that is the same for all samples and broadcasts over one."""
        if isinstance(factor, torch.Tensor):
            if factor.dim() > len(extents):
                if factor.dim() > len(extents) + 1 or factor.shape[0] != 1:
                    return False
                factor = factor[0]
            factor = factor.expand(extents).reshape(-1)
        elif factor == 1:
            return True
        if self.matrix is not None:
            self.matrix = (self.matrix * factor).to(self.matrix.dtype)
        else:
            self.scale = factor if self.scale is None else self.scale * factor
        return True
