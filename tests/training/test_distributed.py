"""Two processes with half of each batch train as one process with all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
