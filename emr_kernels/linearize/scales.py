"""BatchNorm's scale gradient out of a neighbour's weight gradient, so that its cotangent need not be kept.

With v = γ/σ · (...) the output of BatchNorm (and ReLU), ⟨δ_v, u_v⟩ over a channel is γ times the scale's gradient.
Where every reader of v is a convolution or linear layer with weight W, ⟨δ_v, u_v⟩ = ⟨W, dW⟩ over the weights that
read the channel; where BatchNorm alone reads the output of such a layer, it is ⟨W, dW⟩ over those that write it.
dW is proportional to γ, so nothing is lost in the division unless γ underflows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from emr_kernels.linearize.rules import Rule
from emr_kernels.linearize.rules.convolution import BilinearRule
from emr_kernels.linearize.rules.normalization import AffineReluRule, FunctionalBatchNormRule


class ScaleSource(NamedTuple):
    """Whose weight gradients give one BatchNorm's scale gradient.

    Attributes:
        layers: places of the convolutions or linear layers.
        reads: whether they read BatchNorm's output (else: write its input).
    """

    layers: tuple[int, ...]
    reads: bool


def find_scale_sources(rules: Sequence[Rule], kept: Collection[int], dims: dict[int, int]) -> dict[int, ScaleSource]:
    """The source for each BatchNorm that has one, by place among `rules`.

    Args:
        kept: values with a life of their own (taps, logits): a tangent may be put in there.
        dims: number of dimensions of each value.
    """
    readers: dict[int, list[int]] = {}
    makers: dict[int, int] = {}
    for place, rule in enumerate(rules):
        makers[rule.node.index] = place
        for ref in rule.node.refs():
            readers.setdefault(ref, []).append(place)

    def is_layer(place: int) -> bool:
        rule = rules[place]
        # A linear layer's channels are its last extent, BatchNorm's the second.
        return (
            isinstance(rule, BilinearRule)
            and (rule.weight_dims != 2 or dims.get(rule.node.index) == 2)
            and rule.weight_place is not None
        )

    sources: dict[int, ScaleSource] = {}
    for place, rule in enumerate(rules):
        if not isinstance(rule, AffineReluRule) or isinstance(rule, FunctionalBatchNormRule):
            continue
        output, (source,) = rule.node.index, rule.node.active
        after = readers.get(output, [])
        before = makers.get(source)
        if output not in kept and after and all(is_layer(p) and rules[p].node.active == (output,) for p in after):
            sources[place] = ScaleSource(tuple(after), True)
        elif before is not None and source not in kept and readers[source] == [place] and is_layer(before):
            sources[place] = ScaleSource((before,), False)
    return sources


def smallest_scale(dtype: torch.dtype) -> float:
    """Below this a product with γ/σ may underflow, and the cotangent is kept instead."""
    return float(torch.finfo(dtype).tiny ** (1 / 3))
