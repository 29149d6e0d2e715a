"""`emr evaluate`: a model measured, its record kept, and what was found told."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emr_training.attacks import EvaluationWarning
from emr_training.attacks.state import fingerprint
from emr_training.data import Data
from emr_training.errors import check_count
from emr_training.evaluation.evaluate import complete
from emr_training.evaluation.measure import Measure
from emr_training.evaluation.names import epsilon_text, label, parse_epsilon
from emr_training.evaluation.record import Record
from emr_training.evaluation.result import Evaluation
from emr_training.evaluation.settings import Settings
from emr_training.evaluation.subject import Subject
from emr_training.reporting import attacks_table, margins_table


@dataclass(frozen=True)
class Job:
    """What `run` measures of a subject: settings, on which device, of the first `images` alone, kept at `output`."""

    settings: Settings
    device: torch.device
    images: int | None = None
    output: Path | None = None
    overwrite: bool = False


def parse_epsilons(texts: Sequence[str], subject: Subject) -> tuple[float, ...]:
    """The numbers or fractions; without any the radius of the run's own attack.

    Raises ValueError for anything else, or for published weights, whose radius is not known.
    """
    if not texts:
        if subject.method == "weights":
            raise ValueError("eps is not given; expected one or more radii, such as --eps 8/255")
        return (subject.config.attack.epsilon,)
    return tuple(map(parse_epsilon, texts))


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is the GPU if there is one. Raises ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; expected auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}; expected cpu, as torch sees no GPU here")
    return device


def run(subject: Subject, job: Job, console: Console) -> Record:
    """Measure the subject, with progress; the record is written after each attack, and what it has is not repeated.

    Raises ValueError for a record of something else at the output, or more images than there are.
    """
    test = subject.test
    if job.images is not None:
        check_count("images", job.images)
        if job.images > len(test):
            raise ValueError(f"images is {job.images}; expected at most {len(test)}, the test images")
        test = Data(test.x[: job.images], test.y[: job.images])
    output = subject.output if job.output is None else job.output
    model = subject.model.to(job.device)
    digests = fingerprint(model, test.x, test.y, [])
    belongs_to = {"images": len(test), "model": digests["model"], "data": digests["data"], **job.settings.belongs_to()}
    about, config = _about(subject, len(test)), subject.config.model_dump(mode="json")
    before: Evaluation | None = None
    if output.exists() and not job.overwrite:
        found = Record.load(output)
        found.check_same(output, belongs_to)
        before = found.evaluation
    progress = _Progress(console)
    measure = Measure(model, test.to(job.device), job.settings, states=output, verbose=True, on_batch=progress.on_batch)
    runs = [(name, epsilon) for name, epsilon in job.settings.runs() if name.startswith("autoattack")]
    states = [path for path in (measure.state_path(*run) for run in runs) if path is not None]
    if job.overwrite:
        for path in states:
            path.unlink(missing_ok=True)

    def keep(evaluation: Evaluation) -> Record:
        record = Record(about, belongs_to, config, subject.training, evaluation)
        record.save(output)
        for (name, epsilon), path in zip(runs, states, strict=True):
            if evaluation.find(name, epsilon) is not None:
                path.unlink(missing_ok=True)
        return record

    try:
        with warnings.catch_warnings():
            # They are among the lines printed, and told again at the end.
            warnings.simplefilter("ignore", EvaluationWarning)
            record = keep(complete(measure, job.settings, before, keep))
    finally:
        progress.close()
    _tell(record, job.device, output, console)
    return record


def _about(subject: Subject, images: int) -> dict[str, Any]:
    config = subject.config
    return {
        "weights": str(subject.path),
        "name": config.name or (subject.path.stem if subject.method == "weights" else subject.path.parent.name),
        "method": subject.method,
        "model": config.model.name,
        "data": config.data.name,
        "images": images,
        "test_images": len(subject.test),
    }


def _tell(record: Record, device: torch.device, output: Path, console: Console) -> None:
    about, found = record.subject, record.evaluation
    title = f"{about['method']}, {about['model']}, {about['data']}: {about['weights']}"
    console.print()
    console.print(attacks_table(found, title))
    if found.margins:
        console.print()
        console.print(margins_table(found))
    images = f"All {about['images']}" if record.whole else f"The first {about['images']} of {about['test_images']}"
    notes = [
        f"{images} test images, on {device}. ε: radius in {found.norm}, in units of the [0, 1] pixels. Seconds are of "
        "all images, passes of each."
    ]
    if found.margins:
        notes.append(
            "Margins and norms: median (quartiles); a margin is negative where the model is wrong. With an ε: at end "
            "points of PGD-20."
        )
    for attack in found.attacks:
        if attack.details.get("median_distance") is not None and attack.epsilon == found.epsilons[0]:
            notes.append(
                f"{label(attack.name)}: success on {attack.details['successes']} images, at a median distance of "
                f"{attack.details['median_distance']:.4f}."
            )
    for attack in found.attacks:
        for text in attack.details.get("warnings", ()):
            notes.append(f"{label(attack.name)} at {epsilon_text(attack.epsilon)} warns: {text}")
    if found.attacks and not any(a.name.startswith("autoattack") for a in found.attacks):
        notes.append("No AutoAttack among them: robust accuracies are upper bounds that it may lower.")
    notes.append(f"Written to {output}.")
    for note in notes:
        console.print(note, style="dim", highlight=False)


class _Progress:
    """A bar for whatever runs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None

    def on_batch(self, title: str, done: int, total: int) -> None:
        """Begin, move or end the bar."""
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
            self._bar.add_task(title, total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done)
        if done == total:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
