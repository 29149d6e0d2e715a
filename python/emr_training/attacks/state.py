"""The state of a long evaluation, on disk, so that it can go on after it was cut off."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: Of `State.broken_by`: no attack succeeded; misclassified from the beginning.
ROBUST, WRONG = -1, -2


def fingerprint(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, settings: list[str]) -> dict[str, str]:
    """What a state belongs to: digests of the data and of the model's parameters and buffers, and the settings."""

    def digest(tensors: list[Tensor]) -> str:
        found = hashlib.sha256()
        for tensor in tensors:
            plain = tensor.detach().cpu().contiguous()
            found.update(f"{plain.dtype} {list(plain.shape)}".encode())
            found.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    parts = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return {"data": digest([x, y]), "model": digest(parts), "settings": "\n".join(settings)}


def foreign(path: Path | None, part: str, detail: str = "") -> ValueError:
    """The error for a state in whose evaluation a `part` was another one."""
    return ValueError(
        f"state_path is {str(path)!r}, the state of an evaluation with another {part}; expected the {part} of this "
        f"one. Delete the file, or choose another path, to start anew{detail}"
    )


@dataclass
class Record:
    """What one attack has done: images attacked and broken, images run forward and backward, seconds, when it ended."""

    name: str
    attacked: int = 0
    broken: int = 0
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    done: bool = False


@dataclass
class State:
    """How far an evaluation of N images is. Its tensors but for x_adv are on the CPU.

    broken_by: [N], the number of the attack that broke an image, ROBUST or WRONG.
    predicted: [N], the class at the adversarial example.
    tried: [N], whether the attack that is running has had the image.
    x_adv: like the images; an image itself until it is broken.
    probe: logits of the first images, float64, by which the model is recognised.
    checked: whether the signs of a faulty evaluation have been looked for.
    """

    broken_by: Tensor
    predicted: Tensor
    tried: Tensor
    x_adv: Tensor
    records: list[Record]
    probe: Tensor
    warnings: list[str] = field(default_factory=list)
    checked: bool = False

    @property
    def robust(self) -> Tensor:
        """Which images no attack has broken so far, [N]."""
        return self.broken_by == ROBUST

    def save(self, path: Path, belongs_to: dict[str, str]) -> None:
        """Write to `path`: whole or not at all."""
        changed = (self.broken_by >= 0).nonzero().squeeze(1)
        content = {
            "belongs_to": belongs_to,
            "broken_by": self.broken_by,
            "predicted": self.predicted,
            "tried": self.tried,
            "changed": self.x_adv[changed].cpu(),
            "records": [vars(record) for record in self.records],
            "probe": self.probe,
            "warnings": self.warnings,
            "checked": self.checked,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            torch.save(content, beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    @staticmethod
    def load(path: Path, belongs_to: dict[str, str], x: Tensor) -> State:
        """The state in `path`.

        Raises:
            ValueError: if the file is none of these, or belongs to other data, another model or other settings.
        """
        try:
            content: dict[str, Any] = torch.load(path, weights_only=True)
            found, probe = content["belongs_to"], content["probe"]
        except Exception as error:
            raise ValueError(
                f"state_path is {str(path)!r}, which is not the state of an evaluation ({type(error).__name__}: "
                f"{error}); expected such a file, or a path where there is none yet"
            ) from error
        for part, value in belongs_to.items():
            if found.get(part) != value:
                known = f"\nthere: {found.get(part)}\nhere:  {value}" if part == "settings" else ""
                raise foreign(path, part, known)
        x_adv = x.clone()
        x_adv[(content["broken_by"] >= 0).to(x.device)] = content["changed"].to(x.device)
        records = [Record(**record) for record in content["records"]]
        return State(
            content["broken_by"],
            content["predicted"],
            content["tried"],
            x_adv,
            records,
            probe,
            content["warnings"],
            content["checked"],
        )


class Saver:
    """Saves a state now and then, in at most a twentieth of the time."""

    def __init__(self, path: Path | None, belongs_to: dict[str, str]) -> None:
        self.path, self._belongs_to = path, belongs_to
        self._next = 0.0

    def __call__(self, state: State, *, now: bool = False) -> None:
        """Save, if there is a path and it is time (or `now`)."""
        if self.path is None or (not now and time.monotonic() < self._next):
            return
        begin = time.monotonic()
        state.save(self.path, self._belongs_to)
        end = time.monotonic()
        self._next = end + 20 * (end - begin)
