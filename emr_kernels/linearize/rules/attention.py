"""Scaled dot-product attention: fused kernels have no second derivative, so the plain formulas run.

With S = scale q kᵀ + mask, P = softmax(S) and o = P v, a row's softmax has the symmetric Jacobian
Π g = P ∘ (g − Σ P g), which serves every direction. For a cotangent δ and tangents q̇, k̇, v̇:

    dP = δ vᵀ,  dS = Π dP                    vjp    scale dS k,  scale dSᵀ q,  Pᵀ δ
    Ṡ = scale (q̇ kᵀ + q k̇ᵀ),  Ṗ = Π Ṡ        jvp    Ṗ v + P v̇

and of ⟨δ, ȯ⟩ = ⟨dP, Ṗ⟩ + ⟨δ, P v̇⟩, with m = Σ P dP and r = Σ P Ṡ of each row,

    G = Π (dP ∘ (Ṡ − r) − m Ṡ + δ v̇ᵀ)        adjoint    scale (G k + dS k̇),  scale (Gᵀ q + dSᵀ q̇),  Ṗᵀ δ
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from emr_kernels.linearize.graph import Node
from emr_kernels.linearize.rules.base import Rule, SecondOrder, Tensors, rule_for, sum_to
from emr_kernels.linearize.rules.generic import GenericRule
from emr_kernels.ops._format import compute_dtype

aten = torch.ops.aten


class _Attention(NamedTuple):
    """What a call keeps: its activations, and the probabilities P, `[..., L, S]`, in the dtype of the arithmetic."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    probabilities: torch.Tensor
    scale: float

    @property
    def wide(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v in the dtype of the arithmetic."""
        dtype = self.probabilities.dtype
        return self.query.to(dtype), self.key.to(dtype), self.value.to(dtype)

    def through_softmax(self, rows: torch.Tensor) -> torch.Tensor:
        """Π of the module's docstring."""
        p = self.probabilities
        result: torch.Tensor = aten._softmax_backward_data.default(rows, p, -1, p.dtype)
        return result

    def narrowed(self, *grads: torch.Tensor | None) -> Tensors:
        """Gradients of q, k and v in their shapes and dtypes."""
        like = (self.query, self.key, self.value)
        return tuple(None if g is None else sum_to(g, t.shape).to(t.dtype) for g, t in zip(grads, like, strict=True))


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(-2, -1)


def _plus(*terms: torch.Tensor | None) -> torch.Tensor | None:
    """Their sum, in the first one's memory: products of which nobody else holds any. None where there is no term."""
    total: torch.Tensor | None = None
    for term in terms:
        if term is not None:
            total = term if total is None else total.add_(term)
    return total


def _product(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return None if a is None or b is None else a @ b


@rule_for(aten.scaled_dot_product_attention.default)
class AttentionRule(Rule):
    """softmax(q kᵀ · scale + mask) v of three different activations, without dropout."""

    curved = True
    matmul = True

    @classmethod
    def accepts(cls, node: Node) -> bool:
        *_, dropout_p, _, _, enable_gqa = _arguments(node.args)
        apart = len(node.active) == 3 and all(node.is_active(place) for place in range(3))
        return apart and not node.weights and not dropout_p and not enable_gqa

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        query, key, value, mask, _, is_causal, scale, _ = _arguments(args)
        dtype = compute_dtype(query)
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
        scores = (query.to(dtype) * factor) @ _transposed(key.to(dtype))
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
            scores = scores.masked_fill_(later, -math.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.to(dtype)
        # A row that is masked altogether has no probabilities rather than NaN.
        probabilities = aten._safe_softmax.default(scores, -1)
        output = (probabilities @ value.to(dtype)).to(query.dtype)
        return output, _Attention(query, key, value, probabilities, factor)

    def vjp(self, residual: _Attention, cotangent: Any) -> Tensors:
        query, key, value = residual.wide
        delta = cotangent.to(query.dtype)
        scores = residual.through_softmax(delta @ _transposed(value)).mul_(residual.scale)
        return residual.narrowed(scores @ key, _transposed(scores) @ query, _transposed(residual.probabilities) @ delta)

    def jvp(self, residual: _Attention, tangents: Tensors) -> Any:
        return self.second_order(residual, None, tangents, (), True).tangent

    def second_order(
        self, residual: _Attention, cotangent: Any, tangents: Tensors, wanted: Sequence[bool], needs_tangent: bool
    ) -> SecondOrder:
        query, key, value = residual.wide
        p, scale = residual.probabilities, residual.scale
        u, v, w = (None if t is None else t.to(p.dtype) for t in tangents)
        keys = _transposed(key)
        scores = _plus(_product(u, keys), _product(query, None if v is None else _transposed(v)))
        moved = None if scores is None else residual.through_softmax(scores.mul_(scale))
        tangent = None
        if needs_tangent:
            tangent = _plus(_product(moved, value), _product(p, w))
            assert tangent is not None
            tangent = tangent.to(residual.query.dtype)
        if cotangent is None:
            return SecondOrder(tangent, (), (None, None, None))

        delta = cotangent.to(p.dtype)
        pulled = delta @ _transposed(value)
        mixed = _product(delta, None if w is None else _transposed(w))
        if scores is not None:
            mean = (p * pulled).sum(-1, keepdim=True)
            # Per row, ⟨dP, Π Ṡ⟩ in P, up to a constant, which the softmax takes away.
            bent = (pulled - mean).mul_(scores).sub_(pulled * (p * scores).sum(-1, keepdim=True))
            mixed = _plus(bent, mixed)
        assert mixed is not None
        second = residual.through_softmax(mixed).mul_(scale)
        first = residual.through_softmax(pulled).mul_(scale)
        return SecondOrder(
            tangent,
            (None,) * len(wanted),
            residual.narrowed(
                _plus(second @ key, _product(first, v)),
                _plus(_transposed(second) @ query, _product(_transposed(first), u)),
                _product(None if moved is None else _transposed(moved), delta),
            ),
        )


@rule_for(aten.scaled_dot_product_attention.default)
class GenericAttentionRule(GenericRule):
    """Every other call, by autograd: shared activations, parameters among them, a mask that depends on x."""

    @classmethod
    def accepts(cls, node: Node) -> bool:
        return True

    def run(self, *args: Any) -> Any:
        query, key, value, mask, dropout_p, is_causal, scale, enable_gqa = _arguments(args)
        return aten._scaled_dot_product_attention_math.default(
            query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]


def _arguments(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, with what was left out."""
    return (*args, *(None, 0.0, False, None, False)[len(args) - 3 :])
