"""A small convolutional network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three 3x3 convolutions, one of stride 2, and a linear layer: x [N, C, H, W] -> logits [N, classes].

    No BatchNorm: on images this small it buys little, and attack, penalty and training then see one network.
    """

    def __init__(self, input_shape: Sequence[int], classes: int, width: int = 16) -> None:
        super().__init__()
        channels, height, width_px = input_shape
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(2 * width * ((height + 1) // 2) * ((width_px + 1) // 2), classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits
