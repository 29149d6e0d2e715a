"""Wide residual networks, with the parameter names of the field's checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Shortcut = Literal["conv", "pad"]


class WideBlock(nn.Module):
    """BatchNorm, activation, conv, twice, plus a shortcut (Zagoruyko and Komodakis 2016).

    Where channels change, the shortcut "conv" is a 1x1 convolution, "pad" an average pool with zero channels on both
    sides; in such a block the first activation feeds both branches.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, slope: float, shortcut: Shortcut) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.changes = inputs != outputs
        self.convShortcut = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False) if self.changes and shortcut == "conv" else None
        )
        self.stride, self.added, self.slope = stride, outputs - inputs, slope

    def _project(self, x: Tensor) -> Tensor:
        if self.convShortcut is not None:
            return self.convShortcut(x)
        pooled = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        return F.pad(pooled, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.bn1(x), self.slope)
        skip = self._project(h) if self.changes else x
        return skip + self.conv2(F.leaky_relu(self.bn2(self.conv1(h)), self.slope))


class _Stage(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-depth-width: x [N, C, H, W] in [0, 1] -> logits [N, classes].

    WRN-34-10 has 46 160 474 parameters for 3 channels and 10 classes; 45 901 914 as Madry et al. build it, with
    negative_slope 0.1 and shortcut "pad".

    Raises ValueError unless depth is 6n + 4.
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        *,
        depth: int = 34,
        width: int = 10,
        negative_slope: float = 0.0,
        shortcut: Shortcut = "conv",
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth is {depth}; expected 6n + 4, as 10, 16, 28, 34")
        blocks = (depth - 4) // 6
        channels = [16, 16 * width, 32 * width, 64 * width]
        stages = []
        for place in range(3):
            inputs, outputs = channels[place], channels[place + 1]
            first = WideBlock(inputs, outputs, 2 if place else 1, negative_slope, shortcut)
            others = [WideBlock(outputs, outputs, 1, negative_slope, shortcut) for _ in range(blocks - 1)]
            stages.append(_Stage(first, *others))
        self.conv1 = nn.Conv2d(input_shape[0], channels[0], 3, 1, 1, bias=False)
        self.block1, self.block2, self.block3 = stages
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], classes)
        self.slope = negative_slope
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.leaky_relu(self.bn1(h), self.slope).mean((2, 3)))
