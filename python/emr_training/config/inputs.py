"""What is trained on what: data and model."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from emr_training.config.section import Section
from emr_training.errors import nearest
from emr_training.importing import is_import_path

DATA = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "npz", "folder")


class AugmentationConfig(Section):
    """How training images are changed, anew in each epoch."""

    crop_padding: int = Field(0, ge=0, description="Pixels of zero padding before a random crop to the same size.")
    flip: bool = Field(False, description="Mirror half of the images.")
    cutout: int = Field(0, ge=0, description="Side of a square set to zero, in pixels.")
    cutmix: bool = Field(
        False,
        description="Paste a window of another image into each, and mix the labels by area (standard, at, trades).",
    )


class DataConfig(Section):
    """The data set, its validation split and its augmentation."""

    name: str = Field(
        "digits",
        description=f"Data set: {', '.join(DATA)}, or package.module:callable that returns one or two Datasets. Digits "
        "come with scikit-learn, the others are read from `root`.",
    )
    root: str | None = Field(None, description="Folder of the original files; of npz the file; of folder the folder.")
    validation: int | float = Field(
        0.15,
        ge=0,
        description="Held out of the training set: a number of images, or a fraction below 1. 0: none. Digits have "
        "splits of their own.",
    )
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)
    checksums: bool = Field(True, description="Whether files with published MD5 sums have to have them.")
    extra: str | None = Field(None, description="An npz file of further training images.")
    extra_fraction: float = Field(0.0, ge=0, lt=1, description="Share of each batch that is taken from `extra`.")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in DATA and not is_import_path(value):
            raise ValueError(f"{nearest(value, list(DATA))}, or 'package.module:callable'")
        return value


class ModelConfig(Section):
    """The classifier."""

    name: str = Field(
        "mlp",
        description="mlp, cnn, resnet-18, preactresnet-18, wrn-D-W (such as wrn-34-10), or wrn-D-W-pad: LeakyReLU and "
        "padded shortcuts; or a callable as package.module:callable, such as torchvision.models.resnet18.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Keyword arguments of a model by import path, all that it gets: num_classes: 10, for instance.",
    )
    mean: tuple[float, ...] | None = Field(
        None,
        description="Taken off the pixels before the model sees them: a number, or one for each channel; with std.",
    )
    std: tuple[float, ...] | None = Field(None, description="What the pixels are then divided by.")
    hypersphere_scale: float | None = Field(
        None, gt=0, description="Logits are this times cosines (Hypersphere Embedding); null: a linear last layer."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if (self.mean is None) != (self.std is None):
            raise ValueError("expected both mean and std, or none")
        return self

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value
