"""Training images on their device, batch by batch as the model takes them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from emr_training.config.inputs import AugmentationConfig
from emr_training.data import Augmentation, Data, as_floats


class TrainingImages:
    """`data`, and the further images `extra` after them, on `device`.

    Batches have the type `dtype` and the memory format `layout` (None: as they come), and are augmented by `config`.

    classes: how many there are, for CutMix's labels.
    changes: the source of the augmentation's random numbers; a generator of its own, so that batches come alike whether
        or not the method draws random starts.
    """

    def __init__(
        self,
        config: AugmentationConfig,
        classes: int,
        data: Data,
        extra: Data | None,
        device: torch.device,
        dtype: torch.dtype,
        layout: torch.memory_format | None,
        seed: int,
    ) -> None:
        self.changes = torch.Generator(device).manual_seed(seed)
        self._data = (data if extra is None else data.followed_by(extra)).to(device)
        self._augmentation = Augmentation(**config.model_dump())
        self._classes = classes
        self._device, self._dtype, self._layout = device, dtype, layout

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The images of these numbers, [N, ...] in [0, 1], augmented, and their labels [N]; [N, C] after CutMix."""
        index = index.to(self._device)
        x, y = self._data.x[index], self._data.y[index]
        if not self._augmentation.changes:
            return self._laid_out(as_floats(x)), y
        mixed = self._augmentation(x, y, self.changes)
        return self._laid_out(mixed.x), mixed.labels(self._classes)

    def unchanged(self, batch_size: int) -> Iterator[Tensor]:
        """All images, without augmentation, in batches of this size."""
        for index in torch.arange(len(self._data)).split(batch_size):
            yield self._laid_out(self._data.images(index.to(self._device)))

    def _laid_out(self, x: Tensor) -> Tensor:
        x = x.to(self._dtype)
        return x if self._layout is None else x.contiguous(memory_format=self._layout)
