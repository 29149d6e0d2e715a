"""`emr compare` and `emr export-robustbench`: what they show, write and refuse."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from emr_training.costs import Costs
from emr_training.evaluation import AttackResult, Evaluation, Margins
from emr_training.evaluation.compare import compare
from emr_training.evaluation.record import Record
from emr_training.evaluation.robustbench import Paper, architecture, export

PNG = b"\x89PNG\r\n\x1a\n"


def bits(count: int, total: int = 100) -> torch.Tensor:
    return torch.arange(total) < count


def record(name: str, clean: int, attacks: dict[tuple[str, float], int], **changes) -> Record:
    """One of 100 images, of which each attack leaves the first so many."""
    details = {"attacks": [{"name": "apgd-ce", "robust_accuracy": 0.5}], "warnings": changes.pop("warnings", [])}
    results = tuple(
        AttackResult(
            attack, epsilon, {"seed": 0, "precision": "float32"}, bits(left), Costs(1.0, 1.0, 5, 100, 9e6, 1e6), details
        )
        for (attack, epsilon), left in attacks.items()
    )
    margins = Margins(0.0, "L2", torch.rand(100) - 0.2, torch.rand(100), torch.rand(100))
    belongs_to = {"images": 100, "model": name, "data": "d", "norm": "Linf", "seed": 0, "precision": "float32"}
    belongs_to |= {"margin_norm": "L2"} | {k: v for k, v in changes.items() if k in (*belongs_to, "margin_norm")}
    subject = {
        "weights": f"{name}/best.pt",
        "name": name,
        "method": "at-emr",
        "model": "wrn-28-10",
        "data": "cifar10",
        "images": belongs_to["images"],
        "test_images": changes.get("test_images", 100),
    }
    config = {"data": {"extra": changes.get("extra")}}
    found = Evaluation(belongs_to["norm"], bits(clean), results, (margins,), Costs(2.0, 2.0, 5, 100, 100, 0))
    return Record(subject, belongs_to, config, vars(Costs(60.0, 60.0, 5, 9, 3e6, 1e6)), found)


def saved(folder: Path, name: str, *args, **changes) -> Path:
    record(name, *args, **changes).save(folder / name / "evaluation.json")
    return folder / name


def told(action, *args, width=300, **options) -> str:
    console = Console(width=width, record=True, file=StringIO())
    action(*args, console, **options)
    return console.export_text()


AA = {("pgd20", 8 / 255): 60, ("autoattack", 8 / 255): 55}


def test_one_table_of_all_runs(tmp_path: Path) -> None:
    runs = [saved(tmp_path, "a", 90, AA), saved(tmp_path, "b", 85, {("pgd20", 8 / 255): 70}, seed=1)]
    (tmp_path / "c").mkdir()
    text = told(compare, [*runs, tmp_path / "c"], tmp_path / "out")
    rows = {line[:27].strip(): line[27:].split("  ") for line in text.splitlines()}
    cells = {name: [cell.strip() for cell in found if cell.strip()] for name, found in rows.items()}
    assert cells["defense"] == ["at-emr", "at-emr"] and cells["model"] == ["wrn-28-10", "wrn-28-10"]
    assert cells["clean, %"] == ["90.0 ± 3.0", "85.0 ± 3.6"]
    assert cells["PGD-20, ε = 8/255, %"] == ["60.0 ± 4.9", "70.0 ± 4.6"]
    assert cells["AutoAttack, ε = 8/255, %"] == ["55.0 ± 5.0", "-"]
    assert cells["worst case, ε = 8/255, %"] == ["55.0 ± 5.0", "70.0 ± 4.6"]
    assert cells["training, seconds"] == ["60", "60"] and cells["training, million passes"] == ["4", "4"]
    assert cells["evaluation, million passes"] == ["20", "10"]
    assert "ε = 8/255" in text and "all 100 test images" in text
    assert "Not every run was evaluated by the same attacks" in text and "The seed differs: a 0, b 1." in text
    assert f"Left out: {tmp_path / 'c'} has no evaluation" in text
    assert f"emr evaluate {tmp_path / 'c'} --attacks pgd20,autoattack --eps 8/255" in text.replace("\n", " ")
    for figure in ("robust_accuracy.png", "effective_margins.png"):
        assert (tmp_path / "out" / figure).read_bytes().startswith(PNG)
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["runs"]["a"]["worst_case"][0]["accuracy"]["correct"] == 55
    assert written["runs"]["b"]["costs"]["training"]["seconds"] == 60.0
    assert written["without_evaluation"] == [str(tmp_path / "c")]


def test_nothing_is_cut_off(tmp_path: Path) -> None:
    runs = [saved(tmp_path, f"a-run-with-a-long-name-{i}", 90, AA) for i in range(5)]
    text = told(compare, runs, tmp_path / "out", width=60)
    assert "…" not in text and "a-run-with-a-long-name-4" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "other"}, r"a/evaluation.json and .*b/evaluation.json are of different data: cifar10"),
        ({"images": 50}, r"different images: cifar10 \(all 100 .*\) and cifar10 \(the first 50 of 100 test images\)"),
        ({"norm": "L2"}, r"different norm: Linf and L2; expected evaluations of the same images in the same norm"),
        ({"margin_norm": "Linf"}, r"different margin norm: L2 and Linf; expected"),
    ],
)
def test_other_images_are_not_mixed(tmp_path: Path, change: dict, message: str) -> None:
    runs = [saved(tmp_path, "a", 90, AA), saved(tmp_path, "b", 85, AA, **change)]
    with pytest.raises(ValueError, match=message):
        told(compare, runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    run = saved(tmp_path, "a", 90, AA)
    with pytest.raises(ValueError, match=r"runs has .*evaluation.json twice"):
        told(compare, [run, run / "evaluation.json"], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no run at .*nowhere"):
        told(compare, [run, tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match=r"c has no evaluation; make one with: emr evaluate .*c$"):
        told(compare, [tmp_path / "c"], tmp_path / "out")


def test_rows_that_share_a_name_are_told_apart(tmp_path: Path) -> None:
    runs = [saved(tmp_path / "x", "a", 90, AA), saved(tmp_path / "y", "a", 85, AA)]
    text = told(compare, runs, tmp_path / "out")
    assert f"{runs[0]} " in text and f"{runs[1]} " in text


PAPER = Paper("Margins Matter", "Ada Lovelace, Alan Turing", "https://example.org", "BMVC 2022")
#: Of the model zoo's own files: every field and its type.
TYPES = {
    "link": str,
    "name": str,
    "authors": str,
    "additional_data": bool,
    "number_forward_passes": int,
    "dataset": str,
    "venue": str,
    "architecture": str,
    "eps": str,
    "clean_acc": str,
    "reported": str,
    "autoattack_acc": str,
    "unreliable": bool,
}


def test_the_model_zoo_s_fields(tmp_path: Path) -> None:
    run = saved(tmp_path, "a", 90, AA, extra="ddpm.npz", warnings=["zero gradients"])
    text = told(export, run, PAPER, None, epsilon=None, partial=False)
    path = run / "robustbench" / "model_info" / "cifar10" / "Linf" / "Lovelace2022Margins_WideResNet-28-10.json"
    info = json.loads(path.read_text())
    assert {name: type(value) for name, value in info.items()} == TYPES
    assert (info["eps"], info["clean_acc"], info["autoattack_acc"], info["reported"]) == (
        "8/255",
        "90.00",
        "55.00",
        "55.00",
    )
    assert (info["additional_data"], info["unreliable"], info["name"]) == (True, True, "Margins Matter")
    issue = (run / "robustbench" / "submission.md").read_text()
    assert issue.startswith("[New Model] Lovelace2022Margins_WideResNet-28-10\n")
    for line in (
        "- **Dataset**: cifar10",
        "- **Threat Model**: Linf",
        "- **eps**: 8/255",
        "- **Clean accuracy**: 90.00%",
        "- **Robust accuracy**: 55.00% (95% interval 45.24 to 64.39%)",
        "- **Additional data**: true",
        "100 of 100 test images",
        "Note: The evaluation warned: zero gradients",
    ):
        assert line in issue
    assert "To be filled in: checkpoint." in text


def test_what_the_authors_say_goes_first(tmp_path: Path) -> None:
    run = saved(tmp_path, "a", 90, AA)
    paper = Paper(name="Mine2030", additional_data=True, reported=57.126)
    text = told(export, run, paper, tmp_path / "out", epsilon=8 / 255, partial=False)
    info = json.loads((tmp_path / "out" / "model_info" / "cifar10" / "Linf" / "Mine2030.json").read_text())
    assert (info["additional_data"], info["reported"], info["autoattack_acc"]) == (True, "57.13", "55.00")
    assert "To be filled in: title, authors, link, venue, checkpoint." in text


def test_part_of_the_test_images_has_to_be_asked_for(tmp_path: Path) -> None:
    run = saved(tmp_path, "a", 90, AA, test_images=10000)
    with pytest.raises(ValueError, match=r"is of 100 of 10000 test images; expected all of them .* or --partial"):
        told(export, run, PAPER, None, epsilon=None, partial=False)
    assert not (run / "robustbench").exists()
    told(export, run, PAPER, None, epsilon=None, partial=True)
    issue = (run / "robustbench" / "submission.md").read_text()
    assert "Note: Only the first 100 of 10000 test images were evaluated." in issue


def test_autoattack_comes_first(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with pytest.raises(
        ValueError, match=r"c has no evaluation; run first: emr evaluate .*c --attacks autoattack --eps 8/255"
    ):
        told(export, tmp_path / "c", PAPER, None, epsilon=None, partial=False)
    run = saved(tmp_path, "b", 90, {("pgd20", 8 / 255): 60})
    with pytest.raises(ValueError, match=r"has no AutoAttack; run first: emr evaluate .*b --attacks autoattack"):
        told(export, run, PAPER, None, epsilon=None, partial=False)
    run = saved(tmp_path, "a", 90, {("autoattack", 8 / 255): 60, ("autoattack", 0.1): 5})
    with pytest.raises(ValueError, match=r"AutoAttack at 8/255, 0.1; expected one of them, --eps"):
        told(export, run, PAPER, None, epsilon=None, partial=False)
    with pytest.raises(ValueError, match=r"has AutoAttack at eps 8/255, 0.1 alone; run first: .* --eps 0.2"):
        told(export, run, PAPER, None, epsilon=0.2, partial=False)
    assert "leaderboard is at eps 8/255, this at 0.1" in told(export, run, PAPER, None, epsilon=0.1, partial=False)


def test_architectures() -> None:
    names = [architecture(m) for m in ("wrn-34-10", "preactresnet-18", "resnet-18", "mlp", "torchvision.models.vgg11")]
    assert names == ["WideResNet-34-10", "PreActResNet-18", "ResNet-18", "mlp", "torchvision.models.vgg11"]
