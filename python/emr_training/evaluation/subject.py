"""What is evaluated: a run's model or published weights, and test images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emr_training.checkpoint import CheckpointError, check_trusted, load_checkpoint
from emr_training.config import RunConfig, make_config, merge
from emr_training.data import Data, Splits
from emr_training.models import load_weights
from emr_training.models.imported import check_fits
from emr_training.training.build import make_model
from emr_training.training.command import load_splits


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode and the test split, on the CPU.

    path: of the weights. output: where its evaluation is kept. method: what made it; "weights" if that is not known.
    training: what the run has cost, if that is known.
    """

    path: Path
    output: Path
    model: nn.Module
    config: RunConfig
    method: str
    test: Data
    training: dict[str, Any] | None


def load_subject(path: Path, options: Mapping[str, Any], *, which: str | None = None, trust: bool = False) -> Subject:
    """What `path` holds: a run's folder, a checkpoint of a run, or published weights.

    Args:
        path: a folder, or a file.
        options: of a configuration: for published weights data, and the model unless its parameters tell; for a run the
            data, where they differ from those that it was trained with.
        which: "best" or "last", of a folder; None: the best if there is one.
        trust: import what a checkpoint names.

    Raises:
        FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    file, output = _locate(path, which)
    if "model" in options:
        if "data" not in options:
            raise ValueError("model is given without data; expected the data set to evaluate it on, such as cifar10")
        config = make_config(options)
        splits = load_splits(config)
        with torch.random.fork_rng(devices=[]):
            model = make_model(config, splits.input_shape, splits.classes)
        method, model = "weights", load_weights(model, file).eval()
    else:
        strange = sorted(set(options) - {"data"})
        if strange:
            raise ValueError(f"{strange[0]} is given for a checkpoint; expected changes of data alone")
        try:
            loaded = load_checkpoint(file, trust=trust)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} (published weights need --data, others than the usual networks --model, too)"
            ) from error
        if loaded.published and "data" not in options:
            raise ValueError(
                f"{file} has published weights; expected the data set to evaluate them on, such as cifar10"
            )
        if not trust and "name" not in options.get("data", {}):
            check_trusted(file, "data", loaded.config.data.name)
        config = make_config(merge(loaded.config.model_dump(mode="json"), options))
        splits = load_splits(config)
        method, model = "weights" if loaded.published else config.method, loaded.model
    _check(file, model, splits)
    return Subject(file, output, model, config, method, splits.test, _training_costs(file))


def record_path(path: Path) -> Path:
    """Where the evaluation of a run's folder or of weights is kept; a JSON file is that itself."""
    if path.suffix == ".json":
        return path
    return path / "evaluation.json" if path.is_dir() else path.with_name(f"{path.stem}.evaluation.json")


def _locate(path: Path, which: str | None) -> tuple[Path, Path]:
    """The file of the weights, and where its evaluation is kept."""
    if not path.is_dir():
        if which is not None:
            raise ValueError(f"checkpoint is {which!r} with the file {path}; expected a run's folder")
        return path, record_path(path)
    best = path / "best.pt"
    default = best if best.is_file() else path / "last.pt"
    file = default if which is None else path / f"{which}.pt"
    if not file.is_file():
        others = sorted(found.name for found in path.glob("*.pt") if found.name != "state.pt")
        there = f"; it holds {', '.join(others)}" if others else ""
        raise FileNotFoundError(f"no {file.name} in {path}{there}")
    return file, record_path(path if file == default else file)


def _check(file: Path, model: nn.Module, splits: Splits) -> None:
    check_fits(model, f"the model of {file}", splits.input_shape, splits.classes, more=True)


def _training_costs(file: Path) -> dict[str, Any] | None:
    """What the run beside the weights has cost."""
    record = file.parent / "run.json"
    if file.stem not in ("best", "last") or not record.is_file():
        return None
    try:
        return json.loads(record.read_text(encoding="utf-8"))["costs"]
    except (ValueError, KeyError):
        return None
