"""The command line: each command end to end, in little, and errors that a user can act on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from emr_training import cli, demo
from emr_training.checkpoint import load_checkpoint

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = demo.DemoSettings(
    epochs=2,
    attack_steps=3,
    attack_restarts=2,
    curve_spacing=0.2,
    temperatures=(1.0,),
    strengths=(1.0, 10.0),
    strengths_at=(1.0,),
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli.console, "_width", 100)
    runner = CliRunner()

    def invoke(*arguments: str):
        return runner.invoke(cli.app, list(arguments), catch_exceptions=False)

    return invoke


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_train_then_evaluate(run, tmp_path: Path, model: str) -> None:
    options = [f"model={model}", "trainer.epochs=2", "penalties.emr.strength=0.5"]
    result = run("train", "--preset", "clean/digits-mlp-at-emr", *options, "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2 and "cross_entropy" in lines[0] and "emr" in lines[0] and "val PGD" in lines[0]

    checkpoint = load_checkpoint(tmp_path / "last.pt")
    config = checkpoint.config
    assert config.penalties.emr is not None
    assert (config.method, config.model.name, config.penalties.emr.strength) == ("at-emr", model, 0.5)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"]["trainer"]["epochs"] == 2 and record["last"]["epoch"] == 2
    assert record["costs"]["forwards"] > 2 * 960 * 10
    assert record["environment"]["packages"]["torch"] == torch.__version__

    out = tmp_path / "evaluation.json"
    options = ("--attacks", "pgd3,fgsm", "--eps", "0.1", "--eps", "51/255", "--images", "100", "--output", str(out))
    result = run("evaluate", str(tmp_path), *options)
    assert result.exit_code == 0, result.output
    for text in ("The first 100 of 539 test images", "PGD-3", "worst case", "Effective margin", "No AutoAttack"):
        assert text in result.output
    found = json.loads(out.read_text())
    assert found["clean"]["accuracy"]["total"] == 100 and found["subject"]["method"] == "at-emr"
    assert [(a["name"], a["epsilon"]) for a in found["attacks"]] == [
        ("pgd3", 0.1),
        ("pgd3", 0.2),
        ("fgsm", 0.1),
        ("fgsm", 0.2),
    ]
    assert found["training"] == record["costs"]

    compared = run("compare", str(tmp_path), "--output", str(tmp_path / "compared"))
    assert compared.exit_code == 0 and "worst case, ε = 0.1, %" in compared.output
    assert (tmp_path / "compared" / "robust_accuracy.png").read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match=r"has no AutoAttack; run first: emr evaluate .* --eps 0.2"):
        run("export-robustbench", str(tmp_path), "--eps", "51/255")


def test_flags_override_the_config_file(run, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("trainer:\n  epochs: 5\n  seed: 2\noptimizer.learning_rate: 0.05\n")
    result = run("train", "--config", str(config), "trainer.epochs=1", "--seed", "3", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    used = load_checkpoint(tmp_path / "last.pt").config
    assert (used.trainer.epochs, used.trainer.seed, used.optimizer.learning_rate) == (1, 3, 0.05)


def test_demo(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DemoSettings", lambda **_: SMALL)
    result = run("demo", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    for text in ("Standard", "EMR", "AT-EMR", "λ=1 T=1", "539 digits", "at most 2.2", "linearized"):
        assert text in result.output
    for figure in ("effective_margins", "robust_accuracy", "training_curves"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(PNG)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["methods"]) == ["Standard", "EMR", "AT", "AT-EMR"]
    for method in results["methods"].values():
        curve = method["robust_accuracy_curve"]
        assert curve[0]["epsilon"] == 0 and curve[-1]["correct"] == 0
        assert curve[0]["correct"] == method["test"]["clean"]["accuracy"]["correct"]
        assert len(method["test"]["margins"][0]["images"]["margins"]) == 539
    assert len(results["selection"]["methods"]["EMR"]["candidates"]) == 2
    assert results["selection"]["methods"]["EMR"]["without_emr"]["strength"] == 0
    assert results["seconds"]["total"] > results["seconds"]["selection"] > 0
    for name in ("standard", "emr", "at", "at-emr"):
        assert load_checkpoint(tmp_path / f"{name}.pt").config.method == name


def test_info(run) -> None:
    result = run("info")
    assert result.exit_code == 0 and torch.__version__ in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "penalties.emr.strength=-1"],
            "error: penalties.emr.strength is -1; expected greater than or equal to 0",
        ),
        (["evaluate", "nowhere.pt"], "error: no checkpoint at nowhere.pt"),
        (["train", "--config", "none.yaml"], "error: cannot read none.yaml: No such file or directory"),
    ],
)
def test_faults_end_in_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["emr", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.strip() == message


def test_unknown_key_in_a_config_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("trainer: {epoch: 3}")
    monkeypatch.setattr(sys, "argv", ["emr", "train", "--config", str(tmp_path / "c.yaml")])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.strip() == "error: unknown option 'trainer.epoch'; did you mean 'trainer.epochs'?"


def test_presets_are_listed_by_what_their_names_hold(run) -> None:
    lines = run("presets").output.splitlines()
    assert len(lines) == 228 and all("  " in line for line in lines)
    lines = run("presets", "paper/", "mail").output.splitlines()
    assert [line.split()[0] for line in lines] == ["paper/mail-at-emr", "paper/mail-trades-emr"]


def test_a_run_goes_on_only_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["emr", "train", "--resume", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.startswith(f"error: no run to resume in {tmp_path}")


def test_resume_takes_up_the_configuration(run, tmp_path: Path) -> None:
    assert run("train", "trainer.epochs=1", "--seed", "4", "--output", str(tmp_path)).exit_code == 0
    result = run("train", "--resume", "trainer.epochs=2", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert result.output.count("epoch ") >= 1 and "epoch 2/2" in result.output and "epoch 1/2" not in result.output
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert checkpoint.config.trainer.seed == 4 and checkpoint.metrics["epoch"] == 2


def test_another_run_is_not_lost(run, tmp_path: Path) -> None:
    command = ("train", "trainer.epochs=1", "--output", str(tmp_path))
    assert run(*command).exit_code == 0
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds a run \(state\.pt\); expected --resume .* --overwrite"):
        run(*command, "--seed", "4")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert run(*command, "--seed", "4", "--overwrite").exit_code == 0
    assert load_checkpoint(tmp_path / "last.pt").config.trainer.seed == 4
