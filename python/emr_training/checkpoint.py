"""Checkpoints: written whole or not at all, and read without executing what they hold."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from emr_training.config import TrainConfig, make_config
from emr_training.models import build_model

FORMAT = 1


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this format."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained model on the CPU in evaluation mode, its settings, and its last metrics."""

    model: nn.Module
    config: TrainConfig
    metrics: dict[str, Any]


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it to disk and rename it over `path`.

    Whoever reads `path` sees the old file or the new one, never a part, even after a crash or a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; give it the permissions that a plain open would have.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def save_checkpoint(
    path: Path,
    model: nn.Module,
    config: TrainConfig,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    metrics: dict[str, Any],
) -> None:
    """Save what `load_checkpoint` needs to rebuild `model`, as tensors and plain types only."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    payload = {
        "format": FORMAT,
        "config": config.model_dump(),
        "input_shape": list(input_shape),
        "classes": classes,
        "metrics": metrics,
        "state_dict": state,
    }
    write_atomically(path, lambda file: torch.save(payload, file))


def load_checkpoint(path: Path) -> Checkpoint:
    """Rebuild the model saved at `path`, on the CPU.

    Raises FileNotFoundError, or CheckpointError naming the fault. Nothing in the file is executed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a checkpoint: {str(error).splitlines()[0]}") from error
    found = payload.get("format") if isinstance(payload, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {found!r}; expected {FORMAT}")
    config = make_config(payload["config"])
    with torch.random.fork_rng(devices=[]):
        model = build_model(config.model, payload["input_shape"], payload["classes"])
    model.load_state_dict(payload["state_dict"])
    return Checkpoint(model.eval(), config, payload["metrics"])
