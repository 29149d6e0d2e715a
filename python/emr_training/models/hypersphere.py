"""Hypersphere Embedding: a last layer that compares directions alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emr_training.errors import check_number


class HypersphereHead(nn.Module):
    """Logits scale * cos(angle between the features and each class's weight); Pang et al. 2020.

    features [N, D] -> logits [N, classes]. Features and weights are normalised in the forward, so gradients flow
    through both norms. The scale is in the logits, so that attacks on cross-entropy do not see a flat loss. The angular
    margin m of its training loss is the defenses' `logit_margin` = scale * m.
    """

    def __init__(self, features: int, classes: int, scale: float = 15.0) -> None:
        super().__init__()
        check_number("scale", scale, low=0.0)
        self.weight = nn.Parameter(torch.empty(classes, features))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


def with_hypersphere_head(model: nn.Module, scale: float = 15.0) -> nn.Module:
    """`model` with a fresh HypersphereHead in the place of its last linear layer, changed in place.

    Raises ValueError if the model has no linear layer.
    """
    last = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not last or not last[-1][0]:
        raise ValueError(f"model {type(model).__name__} has no linear layer inside; expected one at its end")
    name, layer = last[-1]
    parent, _, attribute = name.rpartition(".")
    head = HypersphereHead(layer.in_features, layer.out_features, scale).to(layer.weight)
    setattr(model.get_submodule(parent), attribute, head)
    return model
