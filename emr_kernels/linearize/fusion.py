"""Calls that one kernel can do together."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Collection

import torch

from emr_kernels.linearize.graph import Graph, Node, Ref
from emr_kernels.linearize.rules import Rule, rule_for_node
from emr_kernels.linearize.rules.activations import ReluRule
from emr_kernels.linearize.rules.attention import AttentionRule
from emr_kernels.linearize.rules.convolution import LinearRule
from emr_kernels.linearize.rules.flattened import FlattenedLinearRule
from emr_kernels.linearize.rules.linear_maps import ReshapeRule
from emr_kernels.linearize.rules.matrix_products import MatrixProductRule
from emr_kernels.linearize.rules.normalization import AffineReluRule, BatchNormCall
from emr_kernels.linearize.rules.residual import AffineAddReluRule

aten = torch.ops.aten

_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_TRANSPOSES = {aten.transpose.int, aten.mT.default}
_SOFTMAXES = {aten.softmax.int, aten._softmax.default}
_QUOTIENTS = {aten.div.Tensor, aten.div.Scalar}
_SCALINGS = {aten.mul.Tensor, aten.mul.Scalar, *_QUOTIENTS}


def fuse(graph: Graph, kept: Collection[int], fixed: bool = False) -> list[Rule]:
    """The rules that run the graph's body, in order; a value in `kept` stays a value of its own.

    BatchNorm (evaluation statistics) followed by nothing but a ReLU or LeakyReLU becomes one rule, and so does
    BatchNorm followed by nothing but the addition of a shortcut and that by nothing but the ReLU. Attention written out
    becomes the rule of `scaled_dot_product_attention`. With `fixed` parameters, whose gradients nobody asks for, images
    that are flattened for nothing but a linear layer become one rule with it.
    """
    finder = _Finder(graph, kept)
    swallowed: set[int] = set()
    rules: list[Rule] = []
    for node in graph.body:
        rule = rule_for_node(node) if node.active or node.weights else Rule(node)
        fused: tuple[Rule, list[Node]] | None = None
        if isinstance(rule, ReluRule):
            fused = finder.affine(node, rule.slope) or finder.affine_with_skip(node, rule.slope)
        elif isinstance(rule, MatrixProductRule):
            fused = finder.attention(node)
        elif isinstance(rule, LinearRule) and fixed:
            fused = finder.flattened(node)
        if fused is not None:
            rule, parts = fused
            swallowed.update(part.index for part in parts)
        rules.append(rule)
    return [rule for rule in rules if rule.node.index not in swallowed]


class _Finder:
    """Looks backwards from an activation for calls that feed nothing else."""

    def __init__(self, graph: Graph, kept: Collection[int]) -> None:
        self.shapes = graph.shapes
        self.kept = kept
        self.uses = Counter(ref for node in graph.body for ref in node.refs())
        self.makers = {node.index: node for node in graph.body}

    def affine(self, relu: Node, slope: float) -> tuple[AffineReluRule, list[Node]] | None:
        """BatchNorm and this activation."""
        chain = self._batch_norm(relu.args[0])
        if not chain:
            return None
        norm = chain[0]
        fused = Node(relu.index, f"{norm.name}+{relu.name}", norm.target, norm.args, norm.active, norm.weights)
        return AffineReluRule(fused, slope), chain

    def affine_with_skip(self, relu: Node, slope: float) -> tuple[AffineReluRule, list[Node]] | None:
        """BatchNorm, the addition of another activation of its shape, and this activation."""
        add = self._only_feeds(relu.args[0])
        if add is None or add.target is not aten.add.Tensor or add.args[2] != 1:
            return None
        for place in (0, 1):
            skip = add.args[1 - place]
            chain = self._batch_norm(add.args[place])
            if not chain or not add.is_active(1 - place) or not self._alike(chain[-1].index, skip.index):
                continue
            norm = chain[0]
            name = f"{norm.name}+{add.name}+{relu.name}"
            active = (*norm.active, skip.index)
            fused = Node(relu.index, name, norm.target, (*norm.args, skip), active, norm.weights)
            return AffineAddReluRule(fused, slope, BatchNormCall.of(norm)), [*chain, add]
        return None

    def attention(self, product: Node) -> tuple[AttentionRule, list[Node]] | None:
        """softmax(scale · q kᵀ) v: both products, what is between them, and the transposition of k."""
        value = product.args[1]
        chain, scores = self._softmax(product.args[0])
        if scores is None or not product.is_active(1):
            return None
        scale = 1.0
        while scores is not None and scores.target in _SCALINGS:
            factor = scores.args[1]
            if not isinstance(factor, (int, float)) or factor == 0 or not scores.is_active(0):
                return None
            scale = scale / factor if scores.target in _QUOTIENTS else scale * factor
            chain.append(scores)
            scores = self._only_feeds(scores.args[0])
        if scores is None or scores.target not in _PRODUCTS or not scores.is_active(0) or not scores.is_active(1):
            return None
        query, key = scores.args[0], self._only_feeds(scores.args[1])
        if key is None or key.target not in _TRANSPOSES or not self._last_two(key):
            return None
        chain += [scores, key]
        operands = (query, key.args[0], value)
        if len({self.shapes.get(ref.index, (None,))[:-2] for ref in operands}) > 1:
            return None
        target = aten.scaled_dot_product_attention.default
        args = (*operands, None, 0.0, False, scale, False)
        name = "+".join(part.name for part in (*reversed(chain), product))
        active = tuple(ref.index for ref in operands)
        return AttentionRule(Node(product.index, name, target, args, active)), chain

    def flattened(self, layer: Node) -> tuple[FlattenedLinearRule, list[Node]] | None:
        """Images [N, C, H, W] made rows [N, C·H·W], and the linear layer."""
        reshape = self._only_feeds(layer.args[0])
        if reshape is None or not isinstance(rule_for_node(reshape), ReshapeRule) or not reshape.is_active(0):
            return None
        source, rows = self.shapes.get(reshape.args[0].index, ()), self.shapes.get(reshape.index, ())
        pixels = [extent for extent in source[1:] if extent is not None]
        if len(source) != 4 or len(pixels) != 3 or len(rows) != 2 or rows[1] != math.prod(pixels):
            return None
        name = f"{reshape.name}+{layer.name}"
        fused = Node(layer.index, name, layer.target, (reshape.args[0], *layer.args[1:]), reshape.active, layer.weights)
        return FlattenedLinearRule(fused), [reshape]

    def _softmax(self, value: object) -> tuple[list[Node], Node | None]:
        """Softmax over the last extent if it makes the value and feeds nothing else, and the call before it."""
        chain: list[Node] = []
        node = self._only_feeds(value)
        while node is not None and node.target is aten.dropout.default:
            chain.append(node)
            node = self._only_feeds(node.args[0])
        if node is None or node.target not in _SOFTMAXES or node.args[2] or not node.is_active(0):
            return [], None
        if node.args[1] not in (-1, len(self.shapes.get(node.index, ())) - 1):
            return [], None
        return [*chain, node], self._only_feeds(node.args[0])

    def _last_two(self, transpose: Node) -> bool:
        dims = len(self.shapes.get(transpose.index, ()))
        return dims > 2 and {place % dims for place in transpose.args[1:] or (-2, -1)} == {dims - 2, dims - 1}

    def _alike(self, output: int, skip: int) -> bool:
        shape = self.shapes.get(output) or self.shapes.get(self.makers[output].args[0].index)
        return shape is not None and shape == self.shapes.get(skip)

    def _only_feeds(self, value: object) -> Node | None:
        """The call that makes a value which is read once and not kept."""
        if not isinstance(value, Ref) or self.uses[value.index] != 1 or value.index in self.kept:
            return None
        return self.makers.get(value.index)

    def _batch_norm(self, value: object) -> list[Node]:
        """[batch_norm] or [batch_norm, getitem] if these make the value and feed nothing else, else []."""
        node = self._only_feeds(value)
        if node is None:
            return []
        if BatchNormCall.of(node) is not None:
            return [node] if node.target is aten.batch_norm.default else []
        if node.target is not operator.getitem or node.args[1] != 0:
            return []
        norm = self._only_feeds(node.args[0])
        return [norm, node] if norm is not None and BatchNormCall.of(norm) is not None else []
