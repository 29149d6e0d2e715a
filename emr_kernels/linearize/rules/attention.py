"""Scaled dot-product attention: fused kernels have no second derivative, so the plain formulas run.

With S = scale q kᵀ + mask, P = softmax(S) and o = P v, a row's softmax has the symmetric Jacobian
Π g = P ∘ (g − Σ P g), which serves every direction. For a cotangent δ and tangents q̇, k̇, v̇:

    dP = δ vᵀ,  dS = Π dP                    vjp    scale dS k,  scale dSᵀ q,  Pᵀ δ
    Ṡ = scale (q̇ kᵀ + q k̇ᵀ),  Ṗ = Π Ṡ        jvp    Ṗ v + P v̇

and of ⟨δ, ȯ⟩ = ⟨dP, Ṗ⟩ + ⟨δ, P v̇⟩, with m = Σ P dP and r = Σ P Ṡ of each row,

    G = Π ((dP − m) ∘ (Ṡ − r) + δ v̇ᵀ)           adjoint    scale (G k + dS k̇),  scale (Gᵀ q + dSᵀ q̇),  Ṗᵀ δ
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
    """What a call keeps, as batches of matrices in the dtype of the arithmetic: q, k, v and the probabilities P."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    probabilities: torch.Tensor
    scale: float
    likes: tuple[_Like, _Like, _Like]
    batch: torch.Size
    dtype: torch.dtype

    def matrices(self, tensor: torch.Tensor) -> torch.Tensor:
        """[..., rows, columns] broadcast over the batch, as [B, rows, columns]."""
        return _matrices(tensor, self.batch, self.probabilities.dtype)

    def output(self, matrices: torch.Tensor) -> torch.Tensor:
        """[B, L, E] as the call's output has it."""
        return matrices.view(*self.batch, *matrices.shape[1:]).to(self.dtype)

    def through_softmax(self, rows: torch.Tensor) -> torch.Tensor:
        """Π of the module's docstring."""
        p = self.probabilities
        result: torch.Tensor = aten._softmax_backward_data.default(rows, p, -1, p.dtype)
        return result

    def narrowed(self, *grads: torch.Tensor | None) -> Tensors:
        """Gradients of q, k and v in their shapes and dtypes."""
        return tuple(
            None if g is None else sum_to(g.view(*self.batch, *g.shape[1:]), like.shape).to(like.dtype)
            for g, like in zip(grads, self.likes, strict=True)
        )


class _Like(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype


def _matrices(tensor: torch.Tensor, batch: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype).expand(*batch, -1, -1).reshape(-1, *tensor.shape[-2:])


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(-2, -1)


def _product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · a b."""
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2]).baddbmm_(a, b, beta=0, alpha=scale)


def _sum_of_products(*pairs: tuple[torch.Tensor | None, torch.Tensor | None], scale: float = 1) -> torch.Tensor | None:
    """scale · Σ a b over the pairs of which neither is None, added up as they are made; None where there is none."""
    total: torch.Tensor | None = None
    for a, b in pairs:
        if a is not None and b is not None:
            total = _product(a, b, scale) if total is None else total.baddbmm_(a, b, alpha=scale)
    return total


def _maybe_transposed(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else _transposed(tensor)


@rule_for(aten.scaled_dot_product_attention.default)
class AttentionRule(Rule):
    """softmax(q kᵀ · scale + mask) v of three activations, without dropout; q, k and v may be one."""

    curved = True
    matmul = True
    fresh = True

    @classmethod
    def accepts(cls, node: Node) -> bool:
        *_, dropout_p, _, _, enable_gqa = _arguments(node.args)
        apart = len(node.active) == 3 and all(node.is_active(place) for place in range(3))
        return apart and not node.weights and not dropout_p and not enable_gqa

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        query, key, value, mask, _, is_causal, scale, _ = _arguments(args)
        dtype = compute_dtype(query)
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
        batches = [tensor.shape[:-2] for tensor in (query, key, value)]
        # Broadcasting takes its time.
        batch = batches[0] if batches.count(batches[0]) == 3 else torch.broadcast_shapes(*batches)
        q, k, v = (_matrices(tensor, batch, dtype) for tensor in (query, key, value))
        scores = _product(q, _transposed(k), factor)
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
            scores = scores.masked_fill_(later, -math.inf)
        if mask is None:
            probabilities = torch.softmax(scores, -1)
        else:
            scores = scores.view(*batch, *scores.shape[1:])
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.to(dtype)
            # A row that is masked altogether has no probabilities rather than NaN.
            probabilities = aten._safe_softmax.default(scores.reshape(-1, *scores.shape[-2:]), -1)
        likes = _Like(query.shape, query.dtype), _Like(key.shape, key.dtype), _Like(value.shape, value.dtype)
        residual = _Attention(q, k, v, probabilities, factor, likes, batch, query.dtype)
        return residual.output(torch.bmm(probabilities, v)), residual

    def vjp(self, residual: _Attention, cotangent: Any) -> Tensors:
        p, scale = residual.probabilities, residual.scale
        delta = residual.matrices(cotangent)
        scores = residual.through_softmax(torch.bmm(delta, _transposed(residual.value)))
        return residual.narrowed(
            _product(scores, residual.key, scale),
            _product(_transposed(scores), residual.query, scale),
            torch.bmm(_transposed(p), delta),
        )

    def jvp(self, residual: _Attention, tangents: Tensors) -> Any:
        return self.second_order(residual, None, tangents, (), True).tangent

    def second_order(
        self, residual: _Attention, cotangent: Any, tangents: Tensors, wanted: Sequence[bool], needs_tangent: bool
    ) -> SecondOrder:
        query, key, value, p, scale = residual[:5]
        u, v, w = (None if t is None else residual.matrices(t) for t in tangents)
        scores = _sum_of_products((u, _transposed(key)), (query, _maybe_transposed(v)), scale=scale)
        moved = None if scores is None else residual.through_softmax(scores)
        tangent = None
        if needs_tangent:
            total = _sum_of_products((moved, value), (p, w))
            assert total is not None
            tangent = residual.output(total)
        if cotangent is None:
            return SecondOrder(tangent, (), (None, None, None))

        delta = residual.matrices(cotangent)
        pulled = torch.bmm(delta, _transposed(value))
        first = residual.through_softmax(pulled)
        mixed = None if w is None else torch.bmm(delta, _transposed(w))
        if scores is not None:
            # Per row, ⟨dP, Π Ṡ⟩ in P, up to a constant, which the softmax takes away.
            pulled_mean = (p * pulled).sum(-1, keepdim=True)
            scores_mean = (p * scores).sum(-1, keepdim=True)
            pulled, scores = pulled.sub_(pulled_mean), scores.sub_(scores_mean)
            mixed = pulled.mul_(scores) if mixed is None else mixed.addcmul_(pulled, scores)
        assert mixed is not None
        second = residual.through_softmax(mixed)
        return SecondOrder(
            tangent,
            (None,) * len(wanted),
            residual.narrowed(
                _sum_of_products((second, key), (first, v), scale=scale),
                _sum_of_products((_transposed(second), query), (_transposed(first), u), scale=scale),
                None if moved is None else torch.bmm(_transposed(moved), delta),
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
