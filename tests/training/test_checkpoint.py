"""Checkpoints: whole or absent, loadable without executing code, and their faults named."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from emr_training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, write_atomically
from emr_training.config import make_config
from emr_training.data import Data


def save(path: Path, model: nn.Module) -> None:
    config = make_config({"trainer.epochs": 10})
    save_checkpoint(path, model, config, input_shape=(1, 8, 8), classes=10, metrics={"epoch": 10})


def test_round_trip(tmp_path: Path, net: nn.Module, batch: Data) -> None:
    path = tmp_path / "new" / "model.pt"
    save(path, net)
    rng = torch.get_rng_state()
    loaded = load_checkpoint(str(path))
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(loaded.model(batch.x), net(batch.x))
    assert loaded.config == make_config({"trainer.epochs": 10}) and loaded.metrics == {"epoch": 10}
    assert not loaded.model.training


def test_holds_only_what_weights_only_reads(tmp_path: Path, net: nn.Module) -> None:
    save(tmp_path / "model.pt", net)
    payload = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set(payload) == {"format", "config", "input_shape", "classes", "metrics", "state_dict"}


def test_failed_write_keeps_the_old_file_and_no_litter(
    tmp_path: Path, net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    save(path, net)
    old = path.read_bytes()

    def fail(payload, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*model.pt: No space left on device; the earlier one"):
        save(path, net)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_synced_before_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_atomically(tmp_path / "f", lambda file: file.write(b"x"))
    assert events[:2] == ["fsync", "rename"]
    assert (tmp_path / "f").read_bytes() == b"x"


def test_faults_are_named(tmp_path: Path, net: nn.Module) -> None:
    path = tmp_path / "model.pt"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_checkpoint(path)
    torch.save({"format": 99}, path)
    with pytest.raises(CheckpointError, match="has checkpoint format 99; expected 2"):
        load_checkpoint(path)
    torch.save(net, path)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_checkpoint(path)
