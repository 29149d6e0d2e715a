"""Derivative rules, one file a family of operators; importing this package fills the table."""

from emr_kernels.linearize.graph import Node
from emr_kernels.linearize.rules import (
    activations,
    arithmetic,
    attention,
    convolution,
    layer_norm,
    linear_maps,
    matrix_products,
    normalization,
    outputs,
    pooling,
    residual,
)
from emr_kernels.linearize.rules.base import Rule, lookup
from emr_kernels.linearize.rules.generic import GenericRule

__all__ = [
    "GenericRule",
    "Rule",
    "activations",
    "arithmetic",
    "attention",
    "convolution",
    "layer_norm",
    "linear_maps",
    "lookup",
    "matrix_products",
    "normalization",
    "outputs",
    "pooling",
    "residual",
    "rule_for_node",
]


def rule_for_node(node: Node) -> Rule:
    """The rule that serves this call."""
    return (lookup(node) or GenericRule)(node)
