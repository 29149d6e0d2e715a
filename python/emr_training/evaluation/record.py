"""An evaluation on disk: what was evaluated, how, and what was found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emr_training.evaluation.result import Evaluation
from emr_training.reporting.results import environment, write_json

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """The content of an evaluation.json.

    subject: for readers: the file of the weights, the method, the model, the data, how many images of how many.
    belongs_to: digests of model and data, and the settings that all attacks share.
    config: of the run; of published weights what was given. training: the costs of the run, if it is known.
    """

    subject: dict[str, Any]
    belongs_to: dict[str, Any]
    config: dict[str, Any]
    training: dict[str, Any] | None
    evaluation: Evaluation

    @property
    def whole(self) -> bool:
        """Whether all of the test images were evaluated."""
        return bool(self.subject["images"] == self.subject["test_images"])

    def save(self, path: Path) -> None:
        """Write to `path`, whole or not at all."""
        parts = {name: getattr(self, name) for name in ("subject", "belongs_to", "config", "training")}
        write_json(path, {"format": FORMAT, **parts, "environment": environment(), **self.evaluation.as_dict()})

    @staticmethod
    def load(path: Path) -> Record:
        """The record in `path`. Raises ValueError for a file that is none."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']}, expected {FORMAT}")
            parts = {name: found[name] for name in ("subject", "belongs_to", "config", "training")}
            return Record(**parts, evaluation=Evaluation.from_dict(found))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not an evaluation of `emr evaluate`: {error!r}") from error

    def check_same(self, path: Path, belongs_to: dict[str, Any]) -> None:
        """Raise ValueError, naming what differs, unless what is in `path` can be gone on with."""
        differ = [name for name, value in belongs_to.items() if self.belongs_to.get(name) != value]
        if differ:
            texts = [
                name if len(str(belongs_to[name])) > 20 else f"{name} ({self.belongs_to.get(name)}, here {value})"
                for name, value in belongs_to.items()
                if name in differ
            ]
            raise ValueError(
                f"{path} holds an evaluation with other {', '.join(texts)}; expected the same, another --output, or "
                "--overwrite"
            )
