"""`emr export-robustbench`: what RobustBench asks for with a new model, made from an AutoAttack evaluation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from emr_training.checkpoint import write_atomically
from emr_training.evaluation.names import epsilon_text
from emr_training.evaluation.record import Record
from emr_training.evaluation.result import AttackResult
from emr_training.evaluation.subject import record_path
from emr_training.reporting import write_json

#: What its leaderboards hold; anything else can be written, but has no place there.
LEADERBOARDS = {("cifar10", "Linf"): "8/255", ("cifar100", "Linf"): "8/255", ("cifar10", "L2"): "0.5"}
_FAMILIES = {"resnet": "ResNet", "preactresnet": "PreActResNet", "wrn": "WideResNet"}


@dataclass(frozen=True)
class Paper:
    """What only the authors know. Empty: to be filled in.

    name: of the model in the zoo, `<FirstAuthor><Year><FirstWordOfTitle>`; by default from the others. checkpoint: the
    address of weights and code. additional_data: None: as the configuration says. reported: the robust accuracy of the
    paper in percent; None: that of the evaluation.
    """

    title: str = ""
    authors: str = ""
    link: str = ""
    venue: str = ""
    name: str = ""
    checkpoint: str = ""
    additional_data: bool | None = None
    reported: float | None = None


def export(
    run: Path, paper: Paper, output: Path | None, console: Console, *, epsilon: float | None, partial: bool
) -> Path:
    """Write model_info/<data>/<norm>/<name>.json and submission.md, by default beside the run; returns that folder.

    Raises ValueError where there is no AutoAttack evaluation (of this radius, or of several: which), or one of a part
    of the test images without `partial`.
    """
    path = record_path(run)
    record, found = _find(run, path, epsilon)
    if not record.whole and not partial:
        images, total = record.subject["images"], record.subject["test_images"]
        raise ValueError(
            f"{path} is of {images} of {total} test images; expected all of them (emr evaluate {run} --attacks "
            f"autoattack --eps {epsilon_text(found.epsilon)} --overwrite), or --partial"
        )
    info = model_info(record, found, paper)
    name = paper.name or _zoo_name(record, paper)
    folder = output or path.parent / "robustbench"
    place = Path("model_info") / info["dataset"] / record.evaluation.norm / f"{name}.json"
    write_json(folder / place, info)
    text = submission(record, found, info, paper, name)
    write_atomically(folder / "submission.md", lambda file: file.write(text.encode()))
    console.print(f"{folder / place}\n{folder / 'submission.md'}", highlight=False, soft_wrap=True)
    empty = [field for field in ("title", "authors", "link", "venue", "checkpoint") if not getattr(paper, field)]
    if empty:
        console.print(f"To be filled in: {', '.join(empty)}.", style="dim", highlight=False)
    for note in _notes(record, found, info):
        console.print(note, style="dim", highlight=False)
    return folder


def model_info(record: Record, found: AttackResult, paper: Paper) -> dict[str, Any]:
    """The model zoo's fields; accuracies in percent, as text."""
    extra = record.config["data"].get("extra") is not None
    robust = f"{100 * found.accuracy.value:.2f}"
    return {
        "link": paper.link,
        "name": paper.title,
        "authors": paper.authors,
        "additional_data": extra if paper.additional_data is None else paper.additional_data,
        "number_forward_passes": 1,
        "dataset": record.subject["data"],
        "venue": paper.venue,
        "architecture": architecture(record.subject["model"]),
        "eps": epsilon_text(found.epsilon),
        "clean_acc": f"{100 * record.evaluation.clean.value:.2f}",
        "reported": robust if paper.reported is None else f"{paper.reported:.2f}",
        "autoattack_acc": robust,
        "unreliable": bool(found.details.get("warnings")),
    }


def submission(record: Record, found: AttackResult, info: dict[str, Any], paper: Paper, name: str) -> str:
    """The text of an issue that asks for a new model."""
    low, high = found.accuracy.interval()
    images = f"{record.subject['images']} of {record.subject['test_images']} test images"
    evaluation = f"AutoAttack, standard version, seed {found.settings['seed']}, emr_kernels, {images}"
    attacks = ", ".join(f"{a['name']} {100 * a['robust_accuracy']:.2f}%" for a in found.details["attacks"])
    lines = [
        f"[New Model] {name}",
        "",
        "# Paper Information",
        "",
        f"- **Paper Title**: {paper.title}",
        f"- **Paper URL**: {paper.link}",
        f"- **Paper authors**: {paper.authors}",
        "",
        "# Leaderboard Claim(s)",
        "",
        "## Model 1",
        "",
        f"- **Architecture**: {info['architecture']}",
        f"- **Dataset**: {info['dataset']}",
        f"- **Threat Model**: {record.evaluation.norm}",
        f"- **eps**: {info['eps']}",
        f"- **Clean accuracy**: {info['clean_acc']}%",
        f"- **Robust accuracy**: {info['autoattack_acc']}% (95% interval {100 * low:.2f} to {100 * high:.2f}%)",
        f"- **Additional data**: {str(info['additional_data']).lower()}",
        f"- **Evaluation method**: {evaluation}. Robust accuracy after each attack: {attacks}",
        f"- **Checkpoint and code**: {paper.checkpoint}",
        "",
        *(f"Note: {note}" for note in _notes(record, found, info)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def architecture(model: str) -> str:
    """A model's name as the field writes it: WideResNet-28-10 for wrn-28-10."""
    family, dash, rest = model.partition("-")
    return f"{_FAMILIES[family]}-{rest}" if dash and family in _FAMILIES else model


def _find(run: Path, path: Path, epsilon: float | None) -> tuple[Record, AttackResult]:
    command = f"emr evaluate {run} --attacks autoattack --eps {epsilon_text(epsilon or 8 / 255)}"
    if not path.is_file():
        if not run.exists():
            raise FileNotFoundError(f"no run at {run}")
        raise ValueError(f"{run} has no evaluation; run first: {command}")
    record = Record.load(path)
    results = [a for a in record.evaluation.attacks if a.name == "autoattack"]
    found = [a for a in results if epsilon is None or abs(a.epsilon - epsilon) < 1e-9]
    if not found:
        radii = ", ".join(epsilon_text(a.epsilon) for a in results)
        has = f"AutoAttack at eps {radii} alone" if results else "no AutoAttack"
        raise ValueError(f"{path} has {has}; run first: {command}")
    if len(found) > 1:
        radii = ", ".join(epsilon_text(a.epsilon) for a in found)
        raise ValueError(f"eps is not given and {path} has AutoAttack at {radii}; expected one of them, --eps")
    return record, found[0]


def _notes(record: Record, found: AttackResult, info: dict[str, Any]) -> list[str]:
    notes = []
    if not record.whole:
        images, total = record.subject["images"], record.subject["test_images"]
        notes.append(f"Only the first {images} of {total} test images were evaluated.")
    expected = LEADERBOARDS.get((info["dataset"], record.evaluation.norm))
    if expected is None:
        notes.append(f"RobustBench has no leaderboard for {info['dataset']} in {record.evaluation.norm}.")
    elif expected != info["eps"]:
        notes.append(f"RobustBench's leaderboard is at eps {expected}, this at {info['eps']}.")
    if found.settings["precision"] != "float32":
        notes.append(f"The attacks searched in {found.settings['precision']}; successes were confirmed in float32.")
    notes += [f"The evaluation warned: {text}" for text in found.details.get("warnings", ())]
    return notes


def _zoo_name(record: Record, paper: Paper) -> str:
    """<FirstAuthor><Year><FirstWord>, as far as they are known; without an author the run's method."""
    last = paper.authors.split(",")[0].split()[-1:] or [""]
    year = re.search(r"\d{4}", paper.venue)
    word = paper.title.split()[:1] or [record.subject["method"]]
    parts = [last[0], year[0] if year else "", word[0]]
    name = "".join(re.sub(r"\W", "", part)[:1].upper() + re.sub(r"\W", "", part)[1:] for part in parts)
    return f"{name}_{architecture(record.subject['model'])}".replace("/", "-").replace(":", "-")
