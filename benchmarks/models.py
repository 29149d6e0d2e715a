"""Networks that the benchmarks time; random weights, for shapes alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class WideBlock(nn.Module):
    """Pre-activation block with a 1×1 shortcut where channels or resolution change (Zagoruyko & Komodakis 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        changes = stride != 1 or channels_in != channels
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        return skip + self.conv2(F.relu(self.bn2(self.conv1(h))))


class WideResNet(nn.Module):
    """WRN-depth-width for 32×32 images."""

    def __init__(self, depth: int, width: int, num_classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        layers: list[nn.Module] = []
        for stage in range(3):
            for block in range(blocks):
                source = channels[stage] if block == 0 else channels[stage + 1]
                layers.append(WideBlock(source, channels[stage + 1], 2 if stage and block == 0 else 1))
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.bn(self.blocks(self.conv1(x))))
        return self.fc(h.mean((2, 3)))


def build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network and the shape of one input, by name ("wrn-16-4")."""
    kind, *sizes = name.split("-")
    if kind != "wrn" or len(sizes) != 2:
        raise ValueError(f"model is {name!r}; expected 'wrn-DEPTH-WIDTH'")
    torch.manual_seed(0)
    model = WideResNet(int(sizes[0]), int(sizes[1]))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model, (3, 32, 32)
