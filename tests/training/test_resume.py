"""An interrupted run goes on as if nothing had happened, and a fault of the disk leaves what was there."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from emr_training import checkpoint
from emr_training.checkpoint import CheckpointError, load_checkpoint
from emr_training.config import make_config
from emr_training.data import Data, Splits
from emr_training.training import train

#: All that has a state of its own: momentum, a schedule, averages, random starts, penalties that draw or count.
OPTIONS: dict[str, dict[str, Any]] = {
    "at-emr": {"defense": "at", "penalties.emr": {"every": 2, "subset": 0.5}, "trainer.average": "ema"},
    "cutmix": {"defense": "trades", "data.augmentation": {"crop_padding": 1, "flip": True, "cutmix": True}},
    "trades": {"defense": "trades", "penalties.llr": {}, "optimizer.name": "adamw", "optimizer.learning_rate": 1e-3},
    "mail": {"defense": "at", "defense.mail": {}, "defense.burn_in.epoch": 2, "trainer.average": "swa"},
}
EPOCHS, STEPS = 3, 15  # of 4 batches, the last one short

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from emr_training.config import make_config
from emr_training.training import train
torch.set_num_threads(1)
given = torch.load(sys.argv[1])
from emr_training.data import Data
def on_step(step, steps, images):
    if step == given["kill"]:
        os.kill(os.getpid(), signal.SIGKILL)
data, validation = (Data(given[name + "_x"], given[name + "_y"]) for name in ("train", "validation"))
train(make_config(given["options"]), data, validation, 10, output=Path(given["output"]), resume=given["resume"],
      on_step=on_step)
"""


def small(splits: Splits) -> tuple[Data, Data]:
    train_part, validation = splits.train, splits.validation
    return Data(train_part.x[:300], train_part.y[:300]), Data(validation.x[:64], validation.y[:64])


def killed_at(step: int, options: dict[str, Any], splits: Splits, output: Path, resume: bool) -> int:
    """Run in a process of its own, which kills itself after this step; its exit status."""
    data, validation = small(splits)
    given = {
        "options": options,
        "output": str(output),
        "resume": resume,
        "kill": step,
        "train_x": data.x,
        "train_y": data.y,
        "validation_x": validation.x,
        "validation_y": validation.y,
    }
    path = output.with_suffix(".given")
    torch.save(given, path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("method", OPTIONS)
def test_killed_at_random_steps_and_resumed(splits: Splits, tmp_path: Path, method: str) -> None:
    options = {**OPTIONS[method], "trainer.epochs": EPOCHS, "trainer.drop_last": False, "trainer.checkpoint_steps": 2}
    config = make_config(options)
    data, validation = small(splits)
    whole = train(config, data, validation, 10, output=tmp_path / "whole")
    # The first checkpoint comes after step 2.
    first, second = sorted(random.Random(os.urandom(8)).sample(range(3, STEPS), 2))
    assert killed_at(first, options, splits, tmp_path / "cut", resume=False) == -signal.SIGKILL
    assert killed_at(second, options, splits, tmp_path / "cut", resume=True) == -signal.SIGKILL
    result = train(config, data, validation, 10, output=tmp_path / "cut", resume=True)

    where = f"killed at steps {first} and {second}"
    assert same(result.model, whole.model), where
    assert [m.losses for m in result.history] == [m.losses for m in whole.history], where
    assert result.best is not None and whole.best is not None and result.best.epoch == whole.best.epoch
    for name in ("best.pt", "last.pt"):
        assert same(load_checkpoint(tmp_path / "cut" / name).model, load_checkpoint(tmp_path / "whole" / name).model)
    states = [torch.load(tmp_path / run / "state.pt") for run in ("cut", "whole")]
    assert states[0]["processes"][0]["random"].equal(states[1]["processes"][0]["random"])
    assert result.costs.images >= whole.costs.images == 900 and result.costs.seconds > result.history[-1].seconds
    lines = [(tmp_path / run / "metrics.jsonl").read_text().count("\n") for run in ("cut", "whole")]
    assert lines == [EPOCHS, EPOCHS]


def test_sigterm_through_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-c", "from emr_training.cli import main; main()", "train"]
    arguments = ["--preset", "clean/digits-mlp-at", "trainer.epochs=1000", "--output", str(tmp_path)]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "epoch" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 143
    assert f"stopped by SIGTERM; go on with: emr train --resume --output {tmp_path}" in rest
    state = torch.load(tmp_path / "state.pt")
    assert state["step"] >= 15
    assert all(p.isfinite().all() for p in state["model"].values())


def test_full_disk_leaves_the_earlier_checkpoints(
    splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = small(splits)
    config = make_config({"trainer.epochs": 3})
    mkstemp = checkpoint.tempfile.mkstemp
    full: list[bool] = []

    def limited(*args: Any, **kwargs: Any) -> tuple[int, str]:
        """/dev/full in the place of a file: whatever is written there finds no space."""
        handle, name = mkstemp(*args, **kwargs)
        if full:
            os.dup2(os.open("/dev/full", os.O_WRONLY), handle)
        return handle, name

    monkeypatch.setattr(checkpoint.tempfile, "mkstemp", limited)
    kept: dict[str, bytes] = {}

    def on_epoch(metrics: Any) -> None:
        if metrics.epoch == 1:
            kept["state"] = (tmp_path / "state.pt").read_bytes()
            full.append(True)

    with pytest.raises(CheckpointError) as caught:
        train(config, data, None, 10, output=tmp_path, on_epoch=on_epoch)
    message = f"cannot write {tmp_path / 'state.pt'}: {os.strerror(errno.ENOSPC)}; the earlier one there is intact"
    assert str(caught.value) == message
    assert (tmp_path / "state.pt").read_bytes() == kept["state"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "metrics.csv", "metrics.jsonl", "state.pt"]

    full.clear()
    resumed = train(config, data, None, 10, output=tmp_path, resume=True)
    assert same(resumed.model, train(config, data, None, 10).model)


def test_metrics_of_an_epoch_that_was_cut_off_after_its_state(splits: Splits, tmp_path: Path) -> None:
    data, _ = small(splits)
    config = make_config({"trainer.epochs": 2})
    train(config, data, None, 10, output=tmp_path)
    for name in ("metrics.jsonl", "metrics.csv"):
        lines = (tmp_path / name).read_text()
        (tmp_path / name).write_text(lines[: lines.rindex("\n", 0, -1) + 1])
        train(config, data, None, 10, output=tmp_path, resume=True)
        assert (tmp_path / name).read_text() == lines


def test_damaged_and_foreign_states_are_named(splits: Splits, tmp_path: Path) -> None:
    data, validation = small(splits)
    config = make_config({"trainer.epochs": 1})
    train(config, data, validation, 10, output=tmp_path)
    path = tmp_path / "state.pt"
    whole = path.read_bytes()

    def resumed(config: Any = config) -> None:
        train(config, data, validation, 10, output=tmp_path, resume=True)

    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], b"", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"state\.pt is not a checkpoint, or damaged: .*; best.pt and"):
            resumed()
    shutil.copy(tmp_path / "best.pt", path)
    with pytest.raises(CheckpointError, match="is a model, not the state of a run"):
        resumed()
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"optimizer.momentum is 0.5 \(1 such\); expected 0.9, as"):
        resumed(make_config({"trainer.epochs": 1, "optimizer.momentum": 0.5}))
    with pytest.raises(CheckpointError, match=r"state\.pt is the state of a run, to be resumed; expected a model"):
        load_checkpoint(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no run to resume in"):
        resumed()
