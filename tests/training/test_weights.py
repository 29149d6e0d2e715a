"""Weights of published checkpoints: every usual way of storing them, and faults told by name."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from emr_training.checkpoint import CheckpointError, load_checkpoint
from emr_training.models import Normalized, build_model, load_weights
from emr_training.models.weights import read_weights

Weights = dict[str, Tensor]


def wide() -> nn.Module:
    return build_model("wrn-10-1", (3, 8, 8), 10)


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


WAYS: dict[str, Callable[[Weights], Any]] = {
    "plain": lambda w: w,
    "DataParallel": lambda w: prefixed(w, "module."),
    "nested": lambda w: {"state_dict": prefixed(w, "module."), "epoch": 3},
    "compiled": lambda w: {"model_state_dict": prefixed(w, "_orig_mod."), "best": 0.5},
    "behind a normalisation": lambda w: {"net": prefixed(w, "module.model."), "acc": 80.0},
    "unused block": lambda w: {**w, "sub_block1.layer.0.bn1.weight": torch.ones(16)},
    "unused block behind a wrapper": lambda w: prefixed(
        {**w, "sub_block1.layer.0.bn1.weight": torch.ones(16)}, "module."
    ),
    "twice, with its attacker": lambda w: {
        "model": {
            **prefixed(w, "module.model."),
            **prefixed(w, "module.attacker.model."),
            "module.normalizer.new_mean": torch.zeros(3, 1, 1),
            "module.normalizer.new_std": torch.ones(3, 1, 1),
        },
        "epoch": 3,
    },
    "numbers and arguments beside": lambda w: {
        "state_dict": w,
        "best": np.float64(0.5),
        "args": argparse.Namespace(lr=0.1),
    },
    "no counters": lambda w: {n: t for n, t in w.items() if not n.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_storing(tmp_path: Path, way: str) -> None:
    source = wide()
    torch.save(WAYS[way](source.state_dict()), tmp_path / "some.pt")
    model = load_weights(wide(), tmp_path / "some.pt")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), source.eval()(x))


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    source = wide()
    safetensors.save_file(source.state_dict(), tmp_path / "some.safetensors")
    model = load_weights(wide(), tmp_path / "some.safetensors")
    assert torch.equal(model.fc.weight, source.fc.weight)


MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]
_mean, _std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
NORMALISED: dict[str, Callable[[Weights], Any]] = {
    "a Sequential": lambda w: {"0.mean": _mean, "0.std": _std, **prefixed(w, "1.")},
    "parts by name": lambda w: prefixed(
        {"normalize.mean": _mean, "normalize.std": _std, **prefixed(w, "model.")}, "module."
    ),
    "buffers": lambda w: {"state_dict": {"mu": _mean, "sigma": _std, **w}},
}


@pytest.mark.parametrize("way", NORMALISED)
def test_what_normalises_images(tmp_path: Path, way: str) -> None:
    source = wide()
    torch.save(NORMALISED[way](source.state_dict()), tmp_path / "some.pt")
    expected = r"normalises its images; expected model.mean=\[0.4914,0.4822,0.4465\] model.std=\[0.2471,0.2435,0.2616\]"
    for model in (wide(), Normalized(wide(), [0.5], [0.25], 3)):
        with pytest.raises(ValueError, match=expected):
            load_weights(model, tmp_path / "some.pt")
    model = load_weights(Normalized(wide(), MEAN, STD, 3), tmp_path / "some.pt")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), source.eval()((x - _mean) / _std))


def test_weights_alone_for_a_model_that_normalises(tmp_path: Path) -> None:
    source = wide()
    torch.save(prefixed(source.state_dict(), "module."), tmp_path / "some.pt")
    model = load_weights(Normalized(wide(), MEAN, STD, 3), tmp_path / "some.pt")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), source.eval()((x - _mean) / _std))
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    again = load_weights(Normalized(wide(), MEAN, STD, 3), tmp_path / "whole.pt")
    assert torch.equal(again.eval()(x), model(x))


def test_a_users_own_normalisation(tmp_path: Path) -> None:
    """A model that has the names of the file takes all of it."""

    class Own(nn.Sequential):
        def __init__(self, mean: float) -> None:
            super().__init__(nn.Flatten(), nn.Linear(4, 2))
            self.register_buffer("mean", torch.full((1,), mean))

    source = Own(0.5)
    torch.save(prefixed(source.state_dict(), "module."), tmp_path / "some.pt")
    model = load_weights(Own(0.0), tmp_path / "some.pt")
    assert torch.equal(model[1].weight, source[1].weight) and float(model.mean) == 0.5


def test_a_key_of_ones_own(tmp_path: Path) -> None:
    source = wide()
    torch.save({"ema": source.state_dict(), "state_dict": wide().state_dict()}, tmp_path / "some.pt")
    assert torch.equal(load_weights(wide(), tmp_path / "some.pt", "ema").fc.weight, source.fc.weight)
    with pytest.raises(ValueError, match="has no weights under 'swa'; it holds ema, state_dict"):
        read_weights(tmp_path / "some.pt", "swa")


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch pwned",)


def test_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt is not a checkpoint of tensors alone: it holds posix.system, which"):
        read_weights("evil.pt")
    assert not Path("pwned").exists()


def test_faults(tmp_path: Path) -> None:
    source = wide().state_dict()
    path = tmp_path / "some.pt"
    model = wide()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({n: t for n, t in source.items() if n != "fc.bias"}, path)
    with pytest.raises(ValueError, match=r"1 of the model's tensors are not in it \(fc.bias\)"):
        load_weights(model, path)
    torch.save({**source, "head.weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"the model has no head.weight \(1 such\)"):
        load_weights(model, path)
    torch.save({**source, "fc.weight": torch.ones(100, 64)}, path)
    with pytest.raises(ValueError, match=r"fc.weight is \[100, 64\], expected \[10, 64\]"):
        load_weights(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds no tensors by name"):
        load_weights(model, path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="is not a checkpoint of tensors alone"):
        load_weights(model, path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_weights(model, tmp_path / "none.pt")


KNOWN = ["wrn-10-1", "wrn-16-2-pad", "resnet-18", "preactresnet-18"]


@pytest.mark.parametrize("name", KNOWN)
def test_the_parameters_tell_the_network(tmp_path: Path, name: str) -> None:
    source = build_model(name, (3, 8, 8), 7)
    torch.save({"state_dict": prefixed(source.state_dict(), "module.")}, tmp_path / "some.pt")
    loaded = load_checkpoint(tmp_path / "some.pt")
    assert loaded.published and loaded.config.model.name == name and loaded.metrics == {}
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded.model(x), source.eval()(x))


@pytest.mark.parametrize("way", [*WAYS, *NORMALISED])
def test_the_network_of_every_way_of_storing(tmp_path: Path, way: str) -> None:
    source = wide()
    torch.save({**WAYS, **NORMALISED}[way](source.state_dict()), tmp_path / "some.pt")
    model = load_checkpoint(tmp_path / "some.pt").model
    x = torch.rand(2, 3, 8, 8)
    expected = Normalized(source, MEAN, STD, 3) if way in NORMALISED else source
    torch.testing.assert_close(model(x), expected.eval()(x))


def test_a_network_that_the_parameters_do_not_tell(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "some.pt")
    with pytest.raises(
        CheckpointError, match=r"some\.pt: its tensors \(weight, bias, .*none of the networks.*load_weights"
    ):
        load_checkpoint(tmp_path / "some.pt")
    shallow = {name: tensor for name, tensor in wide().state_dict().items() if not name.startswith("block2")}
    torch.save(shallow, tmp_path / "some.pt")
    with pytest.raises(CheckpointError, match="none of the networks"):
        load_checkpoint(tmp_path / "some.pt")
