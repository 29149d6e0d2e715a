"""What is known of each epoch, and where it is written."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emr_training.checkpoint import write_atomically
from emr_training.config import ConfigError
from emr_training.costs import Costs


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch: mean loss terms and accuracy over its images, and accuracies on the validation split.

    `train_accuracy` is on the images trained on, which are adversarial ones in adversarial training.
    Accuracies are fractions; the validation ones are None where there was no validation. `learning_rate` and
    `strengths` are those of the epoch's last step; `costs` are those of the run so far.
    """

    epoch: int
    step: int
    losses: dict[str, float]
    train_accuracy: float
    validation_accuracy: float | None
    validation_robust_accuracy: float | None
    learning_rate: float
    strengths: dict[str, float]
    seconds: float
    images_per_second: float
    costs: Costs

    def is_better_than(self, other: EpochMetrics | None, select: str) -> bool:
        """Whether the validation accuracy, "robust" or "clean", is above the other epoch's; above none if there is one.

        False without validation.
        """

        def accuracy(of: EpochMetrics) -> float | None:
            return of.validation_robust_accuracy if select == "robust" else of.validation_accuracy

        now = accuracy(self)
        if now is None or other is None:
            return now is not None
        return now > (accuracy(other) or 0.0)

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> EpochMetrics:
        """The metrics of `as_dict`."""
        return EpochMetrics(**{**values, "costs": Costs(**values["costs"])})


class MetricFiles:
    """metrics.jsonl and metrics.csv in a run's folder, one line an epoch, and TensorBoard's events if asked for.

    history: the epochs before, of a resumed run. Both files are rewritten whole at each epoch, so that a resumed run
    leaves no line of the time that was lost.
    """

    def __init__(self, folder: Path, history: Sequence[EpochMetrics], *, tensorboard: bool = False) -> None:
        self._folder = folder
        self._events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ConfigError(
                    "trainer.tensorboard is true, but tensorboard is not installed; expected `pip install tensorboard`"
                ) from None
            self._events = SummaryWriter(str(folder / "tensorboard"))
        if history:
            # A run may have been cut off between its state and the epoch's line.
            self.epoch(history)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Numbers of one step, for TensorBoard."""
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    @property
    def wants_steps(self) -> bool:
        """Whether `step` does anything."""
        return self._events is not None

    def epoch(self, history: Sequence[EpochMetrics]) -> None:
        """Write the epochs so far."""
        rows = [flat(metrics.as_dict()) for metrics in history]
        lines = "".join(json.dumps(metrics.as_dict(), allow_nan=False) + "\n" for metrics in history)
        write_atomically(self._folder / "metrics.jsonl", lambda file: file.write(lines.encode()))
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self._folder / "metrics.csv", lambda file: file.write(text.getvalue().encode()))
        if self._events is not None and rows:
            for name, value in rows[-1].items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self._events.add_scalar(f"epoch/{name}", value, history[-1].epoch)
            self._events.flush()

    def close(self) -> None:
        """Finish the event files."""
        if self._events is not None:
            self._events.close()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            result.update(flat(value, f"{prefix}{name}."))
        else:
            result[prefix + name] = value
    return result
