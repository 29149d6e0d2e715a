"""Two processes with half of each batch train as one process with all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from emr_training.config import make_config, parse_override
from emr_training.data import Splits
from emr_training.training import train

COMMON = ["trainer.epochs=2", "trainer.device=cpu", "trainer.precision=64", "attack.steps=3", "trainer.drop_last=false"]
COMMON += ["attack.random_start=false", "attack.loss=ce", "evaluation.random_start=false"]
#: Short batches, clipping, and every reduction: all that could depend on how a batch is split.
METHODS = {
    "at-emr": ["defense=at", "penalties.emr.strength=30", "optimizer.clip_norm=1.0"],
    "trades": ["defense=trades", "penalties.emr={strength: 3, reduction: mean}", "trainer.accumulate=2"],
    "mail-mart": ["defense=mart", "defense.mail.slope=5", "penalties.input_gradient.strength=10"],
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one(splits: Splits, tmp_path: Path, method: str) -> None:
    script = tmp_path / "emr.py"
    script.write_text("import torch; torch.set_num_threads(1)\nfrom emr_training.cli import main; main()\n")
    changes = [*COMMON, *METHODS[method]]
    # One of them the way of torchrun, the others that of trainer.devices.
    launcher = [*TORCHRUN, str(script)] if method == "trades" else [str(script)]
    arguments = ["train", *changes, "--output", str(tmp_path / "run")]
    arguments += [] if method == "trades" else ["--devices", "2"]
    done = subprocess.run([sys.executable, *launcher, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/2") == 1, done.stdout

    config = make_config(dict(parse_override(change) for change in changes if "accumulate" not in change))
    alone = train(config, splits.train, splits.validation, 10)
    found_weights = torch.load(tmp_path / "run" / "state.pt")["model"]
    for name, value in alone.model.state_dict().items():
        # Rounding of sums in float64, over 32 steps.
        torch.testing.assert_close(found_weights[name], value, rtol=1e-8, atol=1e-10)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for line, metrics in zip(lines, alone.history, strict=True):
        found = json.loads(line)
        assert found["losses"] == pytest.approx(metrics.losses, rel=1e-7)
        assert found["train_accuracy"] == metrics.train_accuracy
        assert found["validation_robust_accuracy"] == metrics.validation_robust_accuracy
        assert found["costs"]["images"] == metrics.costs.images
        assert found["costs"]["forwards"] == pytest.approx(metrics.costs.forwards, rel=0.01)
    assert found["costs"]["device_seconds"] == 2 * found["costs"]["seconds"]


STOPPED = """
import os, signal, sys
from pathlib import Path
from typing import Any
import torch
from emr_training.config import make_config
from emr_training.data import load_digits
from emr_training.training import train
torch.set_num_threads(1)
stop, resume, output = int(sys.argv[1]), sys.argv[2] == "resume", Path(sys.argv[3])
def on_step(step, steps, images):
    if step == stop:
        os.kill(os.getpid(), signal.SIGTERM)
options = {
    "defense": "at",
    "attack.steps": 3,
    "penalties.emr": {"subset": 0.5, "every": 2},
    "penalties.llr": {},
    "data.augmentation": {"crop_padding": 1, "cutmix": True},
    "trainer": {"epochs": 2, "device": "cpu", "average": "ema"},
}
splits = load_digits(0)
result = train(make_config(options), splits.train, splits.validation, 10, output=output, resume=resume, on_step=on_step)
assert bool(result.stopped) == bool(stop), result.stopped
"""


def test_two_processes_stopped_and_resumed(tmp_path: Path) -> None:
    """The first process gets the signal, in the middle of the second epoch; both stop, and go on to the same bits."""
    script = tmp_path / "train.py"
    script.write_text(STOPPED)

    def run(stop: int, how: str, output: str) -> dict[str, Any]:
        arguments = [*TORCHRUN, str(script), str(stop), how, str(tmp_path / output)]
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        state: dict[str, Any] = torch.load(tmp_path / output / "state.pt")
        return state

    whole = run(0, "anew", "whole")
    assert run(20, "anew", "cut")["step"] == 20
    resumed = run(0, "resume", "cut")
    assert whole["step"] == resumed["step"] == 30
    for part in ("model", "optimizer", "average", "order", "processes"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
    one, other = whole["processes"]
    assert not one["starts"].equal(other["starts"]) and not one["changes"].equal(other["changes"])
