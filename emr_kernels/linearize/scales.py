"""BatchNorm's scale applied by its neighbours, so that its cotangent need not be kept.

BatchNorm (and ReLU) scales a channel by s = γ/σ. Where convolutions or linear layers alone read its output, or it alone
reads the output of one, the linear passes leave s out at the BatchNorm and multiply those layers' weights by it: the
same map. The layers' weight gradients then come out as dW̃ = dW/s, and give both

    dW = s · dW̃        dγ = (1/σ) Σ W · dW̃ over the weights that read (or write) the channel

without a division by γ, which may be zero.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from emr_kernels.linearize.rules import Rule
from emr_kernels.linearize.rules.convolution import BilinearRule
from emr_kernels.linearize.rules.normalization import AffineReluRule, FunctionalBatchNormRule
from emr_kernels.linearize.rules.residual import AffineAddReluRule


class ScaleSource(NamedTuple):
    """The layers that apply one BatchNorm's scale, and whose weight gradients give its gradient.

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
        output, source = rule.node.index, rule.node.active[0]
        after = readers.get(output, [])
        before = makers.get(source)
        reads = not isinstance(rule, AffineAddReluRule) and output not in kept and bool(after)
        if reads and all(is_layer(p) and rules[p].node.active == (output,) for p in after):
            sources[place] = ScaleSource(tuple(after), True)
        elif before is not None and source not in kept and readers[source] == [place] and is_layer(before):
            sources[place] = ScaleSource((before,), False)
    return sources
