"""How large each section is: to see whether it works, on a CPU, on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Scale = Literal["quick", "cpu", "cpu-large", "cuda"]
#: Model, batch, precision.
Size = tuple[str, int, str]


@dataclass(frozen=True)
class Sizes:
    """What each section measures.

    contests: by section. seconds: of a call, beyond which a size of the scaling section is the last. scaling_points: at
    most. parallel: model, batch of a process, precision, steps of an epoch.
    """

    contests: dict[str, tuple[Size, ...]]
    autoattack: dict[str, Any] = field(default_factory=dict)
    epochs: int = 15
    seconds: float = 1.0
    scaling_points: int | None = None
    parallel: tuple[str, int, str, int] = ("wrn-10-1", 32, "fp32", 5)
    precision: str = "fp32"
    resolution: int | None = None


_TINY: tuple[Size, ...] = (("cnn-4", 4, "fp32"),)
_PERCEPTRON: Size = ("mlp-1024-1024-1024", 256, "fp32")
_WIDE: tuple[Size, ...] = (("wrn-28-10", 8, "fp32"), ("wrn-34-10", 8, "fp32"), ("resnet-50", 4, "fp32"))
_CPU: dict[str, tuple[Size, ...]] = {
    "penalty": (_PERCEPTRON, ("cnn", 64, "fp32"), ("vit", 16, "fp32"), ("wrn-16-4", 16, "fp32"),
                ("preactresnet-18", 16, "fp32")),
    "attacks": (("cnn", 64, "fp32"), ("wrn-16-4", 8, "fp32"), ("preactresnet-18", 8, "fp32")),
    "training": (("cnn", 64, "fp32"), ("wrn-16-4", 8, "fp32"), ("preactresnet-18", 8, "fp32")),
    "effective_weights": (_PERCEPTRON, ("cnn", 32, "fp32")),
    "margins": (_PERCEPTRON, ("cnn", 128, "fp32"), ("preactresnet-18", 8, "fp32")),
}  # fmt: skip
_CUDA: dict[str, tuple[Size, ...]] = {
    "penalty": (_PERCEPTRON, ("cnn", 512, "bf16"), ("vit", 256, "bf16"), ("wrn-16-4", 128, "bf16"),
                ("preactresnet-18", 128, "bf16"), ("wrn-28-10", 128, "bf16"), ("wrn-34-10", 128, "bf16"),
                ("resnet-50", 64, "bf16")),
    "attacks": (("wrn-16-4", 128, "bf16"), ("preactresnet-18", 128, "bf16"), ("wrn-34-10", 128, "bf16")),
    "training": (("wrn-16-4", 128, "bf16"), ("preactresnet-18", 128, "bf16"), ("wrn-34-10", 128, "bf16")),
    "effective_weights": (("mlp-1024-1024-1024", 2048, "fp32"), ("cnn", 256, "fp32")),
    "margins": (("mlp-1024-1024-1024", 8192, "fp32"), ("cnn", 1024, "fp32"), ("preactresnet-18", 256, "fp32")),
}  # fmt: skip

SIZES: dict[Scale, Sizes] = {
    "quick": Sizes(
        {name: _TINY for name in _CPU},
        autoattack={"images": 8, "steps": 60, "contenders": ("emr_training",)},
        epochs=1,
        seconds=0.01,
        scaling_points=2,
        parallel=("cnn", 4, "fp32", 2),
        resolution=8,
    ),
    "cpu": Sizes(_CPU, autoattack={"images": 100, "steps": 200}),
    "cpu-large": Sizes({**_CPU, "penalty": _WIDE, "attacks": _WIDE, "training": _WIDE}, seconds=10.0),
    "cuda": Sizes(_CUDA, parallel=("wrn-16-4", 128, "bf16", 10), precision="bf16", autoattack={"images": 500}),
}
