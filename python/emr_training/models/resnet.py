"""ResNet-18 for small images, after and before activation, with the parameter names of the field's checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """conv, BatchNorm, ReLU, conv, BatchNorm, plus the input, ReLU (He et al. 2016a)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


class PreActBlock(nn.Module):
    """BatchNorm, ReLU, conv, twice, plus the input, or its projection after the first ReLU (He et al. 2016b)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        return self.conv2(F.relu(self.bn2(self.conv1(h)))) + skip


def _stages(block: type[nn.Module], counts: Sequence[int]) -> list[nn.Sequential]:
    stages, inputs = [], 64
    for place, count in enumerate(counts):
        outputs = 64 << place
        strides = [2 if place else 1, *[1] * (count - 1)]
        stages.append(nn.Sequential(*(block(inputs if not i else outputs, outputs, s) for i, s in enumerate(strides))))
        inputs = outputs
    return stages


class ResNet18(nn.Module):
    """x [N, C, H, W] in [0, 1] -> logits [N, classes]; 11 173 962 parameters for 3 channels and 10 classes."""

    def __init__(self, input_shape: Sequence[int] = (3, 32, 32), classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(BasicBlock, (2, 2, 2, 2))
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.linear(h.mean((2, 3)))


class PreActResNet18(nn.Module):
    """x [N, C, H, W] in [0, 1] -> logits [N, classes]; 11 172 170 parameters for 3 channels and 10 classes."""

    def __init__(self, input_shape: Sequence[int] = (3, 32, 32), classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], 64, 3, 1, 1, bias=False)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(PreActBlock, (2, 2, 2, 2))
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(F.relu(self.bn(h)).mean((2, 3)))
