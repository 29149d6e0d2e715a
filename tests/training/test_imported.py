"""Models and data sets by import path: called with their options alone, checked against the data, loaded again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from emr_training.checkpoint import CheckpointError, load_checkpoint
from emr_training.config import make_config
from emr_training.data import Splits
from emr_training.importing import import_callable
from emr_training.models import build_model
from emr_training.training import train

SOURCE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes=3, width=8):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(),
                         nn.Linear(width, num_classes))

class Holder:
    make = Net

def not_a_model():
    return 3

constant = 5
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "nets_of_a_user.py").write_text(SOURCE)
    (tmp_path / "needs_another.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "nets_of_a_user"
    for name in ("nets_of_a_user", "needs_another"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("path", ["nets_of_a_user:Net", "nets_of_a_user.Net", "nets_of_a_user:Holder.make"])
def test_called_with_its_options(nets: str, path: str) -> None:
    model = build_model(path, (1, 8, 8), 10, {"num_classes": 10, "width": 5})
    assert type(model).__name__ == "Net" and model[1].out_features == 5
    assert model.training and int(model[2].num_batches_tracked) == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nets_of_a_user:Net", {}, r"Net\(\) returns \[2, 3\] for images \[2, 1, 8, 8\]; expected logits \[2, 10\]"),
        ("nets_of_a_user:Net", {"depth": 3}, r"do not suit nets_of_a_user:Net\(depth=3\): .*'depth'"),
        ("nets_of_a_user:not_a_model", {}, r"not_a_model\(\) returns an object of type int; expected a Module"),
        ("nets_of_a_user:constant", {}, r"model.name is 'nets_of_a_user:constant', of type int; expected a callable"),
        ("nets_of_a_user:Nets", {}, r"nets_of_a_user has no Nets"),
        ("nets_of_a_user.inner:Net", {}, r"No module named 'nets_of_a_user.inner'"),
        ("no_such_package_at_all.vision.resnet", {}, r"the package no_such_package_at_all is not installed"),
        ("needs_another:Net", {}, r"needs a package that is not installed: no_such_package_at_all"),
        ("nets of a user:Net", {}, r"model.name is 'nets of a user:Net'; expected a callable as"),
        ("mlp", {"width": 3}, r"model.options are \{'width': 3\} with model 'mlp'; expected none"),
        ("torch.nn.Linear", {"in_features": 7, "out_features": 2}, r"cannot take images \[2, 1, 8, 8\]: mat1"),
    ],
)
def test_faults_are_named(nets: str, name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(name, (1, 8, 8), 10, options)


def test_an_error_of_the_module_itself_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        import_callable("model.name", "broken_module:Net")


def test_trained_and_loaded_again(nets: str, splits: Splits, tmp_path: Path) -> None:
    config = make_config(
        {
            "model": {"name": f"{nets}:Net", "options": {"num_classes": 10}},
            "trainer.epochs": 1,
            "penalties.emr.strength": 0.1,
        }
    )
    trained = train(config, splits.train, None, splits.classes, output=tmp_path / "run")
    assert trained.engine == "linearized"
    with pytest.raises(CheckpointError, match=r"has nets_of_a_user:Net as its model, .* expected --trust"):
        load_checkpoint(tmp_path / "run" / "last.pt")
    loaded = load_checkpoint(tmp_path / "run" / "last.pt", trust=True)
    assert loaded.config == config
    x = splits.test.images()
    assert torch.equal(loaded.model(x), trained.model(x))
    assert isinstance(loaded.model, nn.Sequential)


def test_what_an_untrusted_file_names_is_not_imported(splits: Splits, tmp_path: Path) -> None:
    config = make_config({"trainer.epochs": 1})
    train(config, splits.train, None, splits.classes, output=tmp_path / "run")
    path = tmp_path / "run" / "last.pt"
    payload = torch.load(path, weights_only=True)
    payload["config"]["model"] = {"name": "os.system", "options": {"command": f"touch {tmp_path}/called"}}
    torch.save(payload, path)
    with pytest.raises(CheckpointError, match="expected --trust"):
        load_checkpoint(path)
    assert not (tmp_path / "called").exists()
