"""Networks that the benchmarks time; random weights, for shapes alone."""

from __future__ import annotations

import re
from itertools import pairwise

import torch
from torch import Tensor, nn

from emr_training.models import build_model
from emr_training.models.cnn import SmallCNN

_MLP = re.compile(r"mlp((?:-\d+)+)")


class _Block(nn.Module):
    """Attention and a perceptron, each behind LayerNorm and beside a shortcut: [N, T, D] -> [N, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5, -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, t, d))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) without a class token: patches, blocks, mean, linear."""

    def __init__(
        self, shape: tuple[int, ...], classes: int, patch: int = 4, width: int = 192, depth: int = 6, heads: int = 3
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(shape[0], width, patch, patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, (shape[1] // patch) * (shape[2] // patch), width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.skip = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride > 1 or inputs != outputs
            else nn.Identity()
        )
        self.end = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.end(self.body(x) + self.skip(x))
        return result


def resnet_50(classes: int) -> nn.Sequential:
    """ResNet-50 (He et al. 2016), the stride in the 3x3 convolution."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ]  # fmt: skip
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            layers.append(_Bottleneck(inputs, width, 2 if stage and not block else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def _mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def input_shape(name: str, resolution: int | None = None) -> tuple[int, ...]:
    """The shape of one input: 784 numbers for "mlp-...", 224 pixels a side for "resnet-50", else 32."""
    if name.startswith("mlp"):
        return (784,)
    side = resolution or (224 if name == "resnet-50" else 32)
    return (3, side, side)


def build(name: str, shape: tuple[int, ...], classes: int = 10) -> nn.Module:
    """A network by name, its weights seeded and BatchNorm's statistics those of no fresh network.

    "mlp-1024-1024" (the widths of its hidden layers), "cnn" or "cnn-64" (its first layer), "vit", "resnet-50",
    or a name that `emr_training.models` knows ("preactresnet-18", "wrn-16-4").
    """
    torch.manual_seed(0)
    perceptron = _MLP.fullmatch(name)
    if perceptron:
        model: nn.Module = _mlp((*shape, *map(int, perceptron[1][1:].split("-")), classes))
    elif re.fullmatch(r"cnn-\d+", name):
        model = SmallCNN(shape, classes, int(name[4:]))
    elif name == "vit":
        model = SmallViT(shape, classes)
    elif name == "resnet-50":
        model = resnet_50(classes)
    else:
        model = build_model(name, shape, classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model
