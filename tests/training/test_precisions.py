"""Reduced precision: it trains, it is what was asked for, and an interrupted run goes on to the same weights."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from torch import nn

from emr_training.config import make_config, merge
from emr_training.data import Data, Splits
from emr_training.training import trainer
from emr_training.training.trainer import TrainResult, train

METHODS: dict[str, dict[str, Any]] = {
    "at-emr": {"defense": "at", "penalties.emr": {}},
    "mart": {"defense": "mart", "penalties.llr": {"strength": 0.1}},
    "cutmix": {"defense": "trades", "data.augmentation.cutmix": True},
}


def small(splits: Splits) -> Data:
    return Data(splits.train.x[:320], splits.train.y[:320])


def interrupted(options: dict[str, Any], data: Data, output: Path) -> TrainResult:
    """The run, ended by a signal after its eighth step and resumed."""

    def at_step(step: int, steps: int, images: int) -> None:
        if step == 8:
            signal.raise_signal(signal.SIGTERM)

    config = make_config(options)
    assert train(config, data, None, 10, output=output, on_step=at_step).stopped == "SIGTERM"
    return train(config, data, None, 10, output=output, resume=True)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_trains_and_resumes(splits: Splits, tmp_path: Path, method: str) -> None:
    options = {
        **METHODS[method],
        "trainer": {"precision": "bf16-mixed", "epochs": 4, "batch_size": 16, "device": "cpu"},
    }
    data = small(splits)
    seen: set[torch.dtype] = set()
    forward = nn.Linear.forward

    def recorded(self: nn.Linear, given: torch.Tensor) -> torch.Tensor:
        found = forward(self, given)
        if self.training:
            seen.add(found.dtype)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", recorded)
        whole = train(make_config(options), data, None, 10)
    assert seen == {torch.bfloat16}
    weights = list(whole.model.parameters())
    assert {p.dtype for p in weights} == {torch.float32}
    assert any((p.bfloat16().float() != p).any() for p in weights)
    losses = [sum(metrics.losses.values()) for metrics in whole.history]
    assert losses[-1] < 0.95 * losses[0]
    resumed = interrupted(options, data, tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(resumed.model.parameters(), weights, strict=True))
    full = train(make_config(merge(options, {"trainer.precision": "32"})), data, None, 10)
    assert sum(full.history[-1].losses.values()) == pytest.approx(losses[-1], rel=0.1)


def test_float16s_scale_is_kept(splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU through a scaler of its own, which Fabric makes for GPUs alone."""

    def float16(**given: Any) -> Fabric:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
        return Fabric(accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu", scaler)])

    monkeypatch.setattr(trainer, "Fabric", float16)
    options = {"trainer.epochs": 4, "trainer.device": "cpu"}
    train(make_config(options), small(splits), None, 10, output=tmp_path / "whole")
    interrupted(options, small(splits), tmp_path / "cut")
    whole, cut = (torch.load(tmp_path / run / "state.pt")["precision"] for run in ("whole", "cut"))
    assert whole == cut and whole["scale"] > 2.0**16


def test_tf32_is_set_for_the_run_alone(splits: Splits) -> None:
    found: list[tuple[str, bool]] = []

    def at_step(step: int, steps: int, images: int) -> None:
        found.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))

    torch.backends.cudnn.allow_tf32 = False
    for precision in ("tf32", "32"):
        options = {"trainer.precision": precision, "trainer.epochs": 1}
        train(make_config(options), small(splits), None, 10, on_step=at_step)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    assert found == [("high", True)] * 5 + [("highest", False)] * 5
