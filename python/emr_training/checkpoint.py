"""Checkpoints: written whole or not at all, and read without executing what they hold."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from emr_training.config import ConfigError, RunConfig, make_config
from emr_training.importing import is_import_path

FORMAT = 2


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint of this format, or that cannot be written."""


class ForeignCheckpointError(CheckpointError):
    """A file that may be somebody else's checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained model on the CPU in evaluation mode, its settings, and its last metrics.

    published: weights from elsewhere; then the settings are those of the model alone, and there are no metrics.
    """

    model: nn.Module
    config: RunConfig
    metrics: dict[str, Any]
    published: bool = False


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


class _Recorded:
    """A file that remembers why a write failed: torch.save reports something else."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_payload(path: Path, payload: dict[str, Any]) -> None:
    """Write tensors and plain types to `path`, whole or not at all.

    Raises CheckpointError when it cannot be written, on a full disk for instance; what was at `path` is still there.
    """

    def write(file: IO[bytes]) -> None:
        recorded = _Recorded(file)
        try:
            torch.save(payload, recorded)  # type: ignore[arg-type]
        except Exception:
            if recorded.error is not None:
                raise recorded.error from None
            raise

    try:
        write_atomically(path, write)
    except OSError as error:
        kept = "; the earlier one there is intact" if path.exists() else ""
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}{kept}") from error


def load_payload(path: Path) -> dict[str, Any]:
    """What `save_payload` wrote, on the CPU. Nothing in the file is executed.

    Raises FileNotFoundError, or CheckpointError for a file that is damaged (ForeignCheckpointError: or something else).
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        # torch does not look at the checksums that its files hold.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its part {damaged} is damaged")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ForeignCheckpointError(f"{path} is not a checkpoint, or damaged: {str(error).splitlines()[0]}") from error
    found = payload.get("format") if isinstance(payload, dict) else None
    if found is None:
        raise ForeignCheckpointError(f"{path} is not a checkpoint of this library: it has no format")
    if found != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {found!r}; expected {FORMAT}")
    return payload


def save_checkpoint(
    path: Path | str,
    model: nn.Module,
    config: RunConfig,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    metrics: dict[str, Any],
) -> None:
    """Save what `load_checkpoint` needs to rebuild `model`, as tensors and plain types only."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    payload = {
        "format": FORMAT,
        "config": config.model_dump(mode="json"),
        "input_shape": list(input_shape),
        "classes": classes,
        "metrics": metrics,
        "state_dict": state,
    }
    save_payload(Path(path), payload)


def load_checkpoint(path: Path | str, *, trust: bool = False) -> Checkpoint:
    """Rebuild the model saved at `path`, on the CPU: by `save_checkpoint`, or published weights of a network of the
    field that its parameters tell (wide ResNets, ResNet-18 and PreActResNet-18; see `load_weights` for others).

    trust: import and call what the file names as its model, where that is an import path (`os.system` is one, too).
    Otherwise nothing that the file holds or names is executed.

    Raises FileNotFoundError, or CheckpointError naming the fault.
    """
    from emr_training.training.build import make_model

    path = Path(path)
    try:
        payload = load_payload(path)
    except ForeignCheckpointError as error:
        return _published(path, error)
    if "state_dict" not in payload:
        raise CheckpointError(f"{path} is the state of a run, to be resumed; expected a model, best.pt or last.pt")
    try:
        config = make_config(payload["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path} holds settings that are not known here: {error}") from None
    if not trust:
        check_trusted(path, "model", config.model.name)
    with torch.random.fork_rng(devices=[]):
        model = make_model(config, payload["input_shape"], payload["classes"])
    model.load_state_dict(payload["state_dict"])
    return Checkpoint(model.eval(), config, payload["metrics"])


def _published(path: Path, fault: CheckpointError) -> Checkpoint:
    """The network that published weights are of. Raises `fault` if the file holds no tensors by name."""
    from emr_training.models.recognised import recognise
    from emr_training.models.weights import put_weights, read_weights
    from emr_training.training.build import make_model

    try:
        weights = read_weights(path)
    except ValueError:
        raise fault from None
    try:
        found = recognise(weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    config = make_config({"model": found.options})
    with torch.random.fork_rng(devices=[]):
        model = make_model(config, (found.channels, 32, 32), found.classes)
    put_weights(model, weights, path)
    return Checkpoint(model.eval(), config, {}, published=True)


def check_trusted(path: Path, what: str, name: str) -> None:
    """Raise CheckpointError if the file at `path` names a callable to import as its `what`."""
    if is_import_path(name):
        raise CheckpointError(
            f"{path} has {name} as its {what}, which is code to import and call; expected --trust (trust=True), to be "
            "given if the file is from somebody you trust"
        )
