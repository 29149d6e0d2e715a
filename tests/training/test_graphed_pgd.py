"""PGD(graph=True): the same points from a CUDA graph where there is a CUDA device, and without one elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emr_training.attacks import PGD, graphed
from emr_training.data import Data

ATTACK = PGD(0.1, 4, keep="last")
GRAPHED = replace(ATTACK, graph=True)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


class Replay:
    """Acts a captured graph out: runs the call again and writes where the first one wrote."""

    captures = 0

    def __init__(self, run: Callable[[], Tensor], result: Tensor) -> None:
        self.run, self.result = run, result

    def replay(self) -> None:
        self.result.copy_(self.run())


@pytest.fixture
def acted_out(monkeypatch: pytest.MonkeyPatch) -> type[Replay]:
    def record(run: Callable[[], Tensor], device: torch.device) -> tuple[Any, Tensor]:
        Replay.captures += 1
        result = run().clone()
        return Replay(run, result), result

    Replay.captures = 0
    monkeypatch.setattr(graphed, "record", record)
    monkeypatch.setattr(graphed, "_reason_against", lambda problem: None)
    return Replay


@pytest.fixture
def normed(batch: Data) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    net(batch.x)
    return net.eval()


def test_on_the_cpu_it_runs_without_a_graph(normed: nn.Module, batch: Data) -> None:
    assert torch.equal(GRAPHED(normed, batch.x, batch.y), ATTACK(normed, batch.x, batch.y))
    assert normed not in graphed._GRAPHS


@pytest.mark.parametrize(
    "options", [{}, {"loss": "kl", "start_std": 0.001}, {"loss": "cw"}, {"norm": "L2"}, {"momentum": 1.0}]
)
def test_replays_give_the_same_points(
    normed: nn.Module, batch: Data, acted_out: type[Replay], options: dict[str, Any]
) -> None:
    plain, captured = replace(ATTACK, **options), replace(GRAPHED, **options)
    for x, y in ((batch.x[:8], batch.y[:8]), (batch.x[8:16], batch.y[8:16])):
        torch.testing.assert_close(captured(normed, x, y), plain(normed, x, y), rtol=0, atol=1e-6)
    assert acted_out.captures == 1


def test_replays_see_changed_parameters_and_statistics(normed: nn.Module, batch: Data, acted_out: type[Replay]) -> None:
    x, y = batch.x[:8], batch.y[:8]
    first = GRAPHED(normed, x, y)
    with torch.no_grad():
        for p in normed.parameters():
            p.mul_(-1.5)
        normed[1].running_mean.add_(0.5)
    again = GRAPHED(normed, x, y)
    assert acted_out.captures == 1
    torch.testing.assert_close(again, ATTACK(normed, x, y), rtol=0, atol=1e-6)
    assert (first - again).abs().max() > 0.05


def test_what_needs_a_graph_of_its_own(normed: nn.Module, batch: Data, acted_out: type[Replay]) -> None:
    x, y = batch.x, batch.y
    GRAPHED(normed, x[:8], y[:8])
    GRAPHED(normed, x[:6], y[:6])
    replace(GRAPHED, steps=5)(normed, x[:8], y[:8])
    GRAPHED(normed, x[:8], y[:8], target=(y[:8] + 1) % 10)
    GRAPHED(copy.deepcopy(normed), x[:8], y[:8])
    assert acted_out.captures == 5
    GRAPHED(normed, x[:8], y[:8])
    assert acted_out.captures == 5


def test_labels_are_checked_at_replays(normed: nn.Module, batch: Data, acted_out: type[Replay]) -> None:
    GRAPHED(normed, batch.x[:8], batch.y[:8])
    with pytest.raises(ValueError, match="y has the label 10; expected labels below the model's 10 classes"):
        GRAPHED(normed, batch.x[:8], torch.full((8,), 10))


def test_a_loop_that_cannot_be_captured_runs_without_a_graph(
    normed: nn.Module, batch: Data, acted_out: type[Replay], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def refuse(run: Callable[[], Tensor], device: torch.device) -> tuple[Any, Tensor]:
        tries.append(run)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphed, "record", refuse)
    for _ in range(2):
        assert torch.equal(GRAPHED(normed, batch.x, batch.y), ATTACK(normed, batch.x, batch.y))
    assert len(tries) == 1


@needs_cuda
def test_on_a_gpu_it_replays(normed: nn.Module, batch: Data) -> None:
    model = copy.deepcopy(normed).cuda()
    for part in (slice(0, 8), slice(8, 16)):
        x, y = batch.x[part].cuda(), batch.y[part].cuda()
        torch.testing.assert_close(GRAPHED(model, x, y), ATTACK(model, x, y), rtol=0, atol=1e-5)
    assert len(graphed._GRAPHS[model]) == 1
