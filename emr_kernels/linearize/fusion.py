"""Calls that one kernel can do together."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection

import torch

from emr_kernels.linearize.graph import Node, Ref
from emr_kernels.linearize.rules import Rule, rule_for_node
from emr_kernels.linearize.rules.activations import ReluRule
from emr_kernels.linearize.rules.normalization import AffineReluRule, BatchNormCall

aten = torch.ops.aten


def fuse(body: list[Node], kept: Collection[int]) -> list[Rule]:
    """The rules that run `body`, in order; a value in `kept` stays a value of its own.

    BatchNorm (evaluation statistics) followed by nothing but a ReLU or LeakyReLU becomes one rule.
    """
    uses = Counter(ref for node in body for ref in node.refs())
    makers = {node.index: node for node in body}
    swallowed: set[int] = set()
    rules: list[Rule] = []
    for node in body:
        if node.index in swallowed:
            continue
        rule = rule_for_node(node) if node.active or node.weights else Rule(node)
        if isinstance(rule, ReluRule):
            chain = _batch_norm_before(node, makers, uses, kept)
            if chain:
                swallowed.update(part.index for part in chain)
                norm = chain[0]
                fused = Node(node.index, f"{norm.name}+{node.name}", norm.target, norm.args, norm.active, norm.weights)
                rule = AffineReluRule(fused, rule.slope)
        rules.append(rule)
    return [rule for rule in rules if rule.node.index not in swallowed]


def _batch_norm_before(relu: Node, makers: dict[int, Node], uses: Counter[int], kept: Collection[int]) -> list[Node]:
    """[batch_norm] or [batch_norm, getitem] if these feed the ReLU alone, else []."""
    chain: list[Node] = []
    node: Node | None = relu
    while node is not None:
        source = node.args[0]
        node = makers.get(source.index) if isinstance(source, Ref) else None
        if node is None or uses[node.index] != 1 or node.index in kept:
            return []
        chain.insert(0, node)
        if BatchNormCall.of(node) is not None:
            return chain
        if node.target is not operator.getitem or node.args[1] != 0:
            return []
    return []
