"""Calls that one kernel can do together."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection

import torch

from emr_kernels.linearize.graph import Graph, Node, Ref
from emr_kernels.linearize.rules import Rule, rule_for_node
from emr_kernels.linearize.rules.activations import ReluRule
from emr_kernels.linearize.rules.normalization import AffineReluRule, BatchNormCall
from emr_kernels.linearize.rules.residual import AffineAddReluRule

aten = torch.ops.aten


def fuse(graph: Graph, kept: Collection[int]) -> list[Rule]:
    """The rules that run the graph's body, in order; a value in `kept` stays a value of its own.

    BatchNorm (evaluation statistics) followed by nothing but a ReLU or LeakyReLU becomes one rule, and so does
    BatchNorm followed by nothing but the addition of a shortcut and that by nothing but the ReLU.
    """
    finder = _Finder(graph, kept)
    swallowed: set[int] = set()
    rules: list[Rule] = []
    for node in graph.body:
        rule = rule_for_node(node) if node.active or node.weights else Rule(node)
        if isinstance(rule, ReluRule):
            fused = finder.affine(node, rule.slope) or finder.affine_with_skip(node, rule.slope)
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
