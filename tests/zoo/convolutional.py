"""The convolutional nets of the field, most of them narrow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import CLASSES, Entry


class SmallCNN(nn.Module):
    """The MNIST net of the TRADES experiments: four unpadded 3x3 convolutions, three linear layers."""

    def __init__(self, width: int = 4, hidden: int = 12) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3),
            nn.ReLU(),
            nn.Conv2d(width, width, 3),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(width, 2 * width, 3),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(2 * width * 16, hidden),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).view(-1, self.classifier[0].in_features))  # type: ignore[arg-type]


def mnist_cnn() -> nn.Module:
    """5x5 convolutions and pools, the small net beside the paper's wide ResNet."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 49, 16),
        nn.ReLU(),
        nn.Linear(16, CLASSES),
    )


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 16, 12),
        nn.Tanh(),
        nn.Linear(12, CLASSES),
    )


class PreActBlock(nn.Module):
    """Pre-activation block; a 1x1 convolution on the activated input where the shape changes."""

    def __init__(self, cin: int, cout: int, stride: int, slope: float = 0.0, channel_padding: bool = False) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(cin), nn.BatchNorm2d(cout)
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.slope, self.stride, self.extra = slope, stride, (cout - cin) // 2
        self.changes = stride != 1 or cin != cout
        if self.changes and not channel_padding:
            self.shortcut = nn.Conv2d(cin, cout, 1, stride, bias=False)

    def activate(self, h: Tensor) -> Tensor:
        return F.leaky_relu(h, self.slope) if self.slope else F.relu(h)

    def forward(self, x: Tensor) -> Tensor:
        a = self.activate(self.bn1(x))
        if not self.changes:
            skip = x
        elif hasattr(self, "shortcut"):
            skip = self.shortcut(a)
        else:
            pooled = F.avg_pool2d(a, self.stride) if self.stride > 1 else a
            skip = F.pad(pooled, (0, 0, 0, 0, self.extra, self.extra))
        return skip + self.conv2(self.activate(self.bn2(self.conv1(a))))


class PreActNet(nn.Module):
    """PreActResNet-18 and the wide ResNets: stages of pre-activation blocks and a head."""

    def __init__(
        self, stem: int, stages: list[tuple[int, int, int]], slope: float = 0.0, padding: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        width = stem
        for channels, depth, stride in stages:
            for i in range(depth):
                blocks.append(PreActBlock(width, channels, stride if i == 0 else 1, slope, padding))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, CLASSES)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.bn(self.blocks(self.conv(x))), self.slope)
        return self.fc(F.adaptive_avg_pool2d(h, 1).flatten(1))


def preact_resnet18(width: int) -> nn.Module:
    return PreActNet(width, [(width, 2, 1), (2 * width, 2, 2), (4 * width, 2, 2), (8 * width, 2, 2)])


def wide_resnet(depth: int, factor: int, base: int = 16, slope: float = 0.0, padding: bool = False) -> nn.Module:
    n, width = (depth - 4) // 6, base * factor
    return PreActNet(base, [(width, n, 1), (2 * width, n, 2), (4 * width, n, 2)], slope, padding)


class PostActBlock(nn.Module):
    """Post-activation block: BatchNorm, addition, in-place ReLU."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(cin, cout, 3, stride, 1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(inplace=True),
            nn.Conv2d(cout, cout, 3, 1, 1, bias=False),
            nn.BatchNorm2d(cout),
        )
        changes = stride != 1 or cin != cout
        self.shortcut = (
            nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout)) if changes else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu(out, inplace=True)


def post_activation_resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        PostActBlock(4, 4, 1),
        PostActBlock(4, 8, 2),
        PostActBlock(8, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


class AddedNorms(nn.Module):
    """Additions around BatchNorm that end in an activation, with the shortcut on either side and read again."""

    def __init__(self, slope: float = 0.0, frozen: str = "") -> None:
        super().__init__()
        self.slope = slope
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.fc = nn.Linear(4, CLASSES)
        for name, parameter in self.named_parameters():
            if frozen and name.startswith(frozen):
                parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first = F.leaky_relu(self.norms[0](self.convs[0](x)) + x, self.slope)
        second = F.leaky_relu(first + self.norms[1](self.convs[1](first)), self.slope)
        # BatchNorm of a value that others read, added to itself.
        third = F.leaky_relu(self.norms[2](second) + self.convs[2](second) + first, self.slope)
        return self.fc((third + second).mean((2, 3)))


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all before it; a transition halves channels and resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 3 * i, 3, 3, padding=1, bias=False) for i in range(3))
        self.transition = nn.Sequential(nn.BatchNorm2d(13), nn.ReLU(), nn.Conv2d(13, 6, 1, bias=False), nn.AvgPool2d(2))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, dim=1)))))
        return self.fc(self.transition(torch.cat(features, 1)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Channel gates: sigmoid of a bottleneck on the global mean, multiplied onto the features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.conv(x)))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(h, 1)))))
        return self.fc((h * gate).mean(dim=(-2, -1)))


def shared_batchnorm() -> nn.Module:
    """One BatchNorm registered twice: its buffers have two names."""
    norm = nn.BatchNorm2d(4)
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    return nn.Sequential(first, norm, nn.ReLU(), second, norm, nn.ReLU(), *head)


class UNet(nn.Module):
    """Down and up again with a skip: max-pool, transposed convolution, interpolation, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.out = nn.Conv2d(12, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down(x))
        b = F.relu(self.middle(F.max_pool2d(a, 2)))
        upsampled = F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(torch.cat([a, F.relu(self.up(b)), upsampled], 1)).mean((2, 3))


ENTRIES = [
    Entry("small_cnn", SmallCNN, (1, 28, 28), piecewise_linear=True, layers=("features.5", "classifier.0")),
    Entry("mnist_cnn", mnist_cnn, (1, 28, 28), piecewise_linear=True),
    Entry("lenet_tanh", lenet, (1, 28, 28)),
    Entry(
        "preact_resnet18_narrow",
        lambda: preact_resnet18(4),
        (3, 16, 16),
        piecewise_linear=True,
        layers=("blocks.2", "blocks.5.conv2", "fc"),
    ),
    Entry(
        "preact_resnet18",
        lambda: preact_resnet18(64),
        (3, 8, 8),
        batch=2,
        piecewise_linear=True,
        any_batch=False,
    ),
    Entry("wrn_16_4", lambda: wide_resnet(16, 4), (3, 8, 8), batch=2, piecewise_linear=True, any_batch=False),
    Entry(
        "wrn_16_4_leaky_channel_padding",
        lambda: wide_resnet(16, 4, base=4, slope=0.1, padding=True),
        (3, 8, 8),
        piecewise_linear=True,
        layers=("blocks.2", "blocks.4.bn2", "bn"),
    ),
    Entry(
        "wrn_10_2",
        lambda: wide_resnet(10, 2, base=2),
        (3, 8, 8),
        piecewise_linear=True,
        layers=("blocks.1", "fc"),
    ),
    Entry("added_norms", AddedNorms, (3, 6, 6), piecewise_linear=True, layers=("convs.1", "fc")),
    Entry("added_norms_leaky", lambda: AddedNorms(0.1), (3, 6, 6), piecewise_linear=True),
    Entry("added_norms_frozen_norms", lambda: AddedNorms(0.1, "norms"), (3, 6, 6), piecewise_linear=True),
    Entry("added_norms_frozen_convs", lambda: AddedNorms(0.0, "convs"), (3, 6, 6), piecewise_linear=True),
    Entry("resnet_post_activation", post_activation_resnet, (3, 8, 8), piecewise_linear=True, layers=("4", "8")),
    Entry("densenet", DenseNet, (3, 6, 6), piecewise_linear=True, layers=("norms.1", "transition", "fc")),
    Entry("squeeze_excite", SqueezeExcite, (3, 6, 6), layers=("down", "fc")),
    Entry("shared_batchnorm", shared_batchnorm, (3, 6, 6), piecewise_linear=True),
    Entry("unet", UNet, (3, 8, 8), piecewise_linear=True),
]
