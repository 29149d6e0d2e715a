"""Scaled dot-product attention: fused kernels have no second derivative, so the plain formula runs."""

from __future__ import annotations

from typing import Any

import torch

from emr_kernels.linearize.graph import Node
from emr_kernels.linearize.rules.base import rule_for
from emr_kernels.linearize.rules.generic import GenericRule

aten = torch.ops.aten


@rule_for(aten.scaled_dot_product_attention.default)
class AttentionRule(GenericRule):
    """softmax(q kᵀ · scale + mask) v."""

    @classmethod
    def accepts(cls, node: Node) -> bool:
        return True

    def run(self, *args: Any) -> Any:
        query, key, value, mask, dropout_p, is_causal, scale, enable_gqa = args
        return aten._scaled_dot_product_attention_math.default(
            query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
