"""`emr train`: a run with its data, progress and record."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from emr_training.config import RunConfig
from emr_training.data import Splits, load_data, load_npz
from emr_training.reporting import environment, metrics_line, write_json
from emr_training.training.metrics import EpochMetrics
from emr_training.training.snapshot import RUN_FILES
from emr_training.training.trainer import TrainResult, train


def load_splits(config: RunConfig) -> Splits:
    """The run's data set, split by its seed."""
    given = config.data
    return load_data(
        given.name, given.root, seed=config.trainer.seed, validation=given.validation, checksums=given.checksums
    )


class TrainingProgress:
    """A bar with throughput and the time that is left, and a line for each epoch.

    Nothing is shown before the first step: of several processes only the first one trains aloud.
    """

    def __init__(self, console: Console, config: RunConfig) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        self._config = config
        self._task: TaskID | None = None
        self._images, self._since = 0, time.perf_counter()

    def on_step(self, step: int, steps: int, images: int) -> None:
        """Move the bar."""
        if self._task is None:
            self._progress.start()
            name = self._config.name or f"{self._config.method} on {self._config.data.name}"
            self._task = self._progress.add_task(name, total=steps, completed=step - 1, rate="")
            self._images, self._since = 0, time.perf_counter()
        self._images += images
        passed = time.perf_counter() - self._since
        rate = f"{self._images / passed:.0f} images/s" if passed > 1 else ""
        self._progress.update(self._task, completed=step, rate=rate)

    def on_epoch(self, metrics: EpochMetrics) -> None:
        """Print the epoch's line."""
        line = metrics_line(metrics, self._config.trainer.epochs)
        self._progress.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._task is not None:
            self._progress.stop()


def run(
    config: RunConfig, output: Path, console: Console, *, resume: bool = False, overwrite: bool = False
) -> str | None:
    """Train as `config` says, into `output`; returns what stopped the run early, if anything did.

    Raises FileExistsError if another run is there, unless it is to be resumed or overwritten.
    """
    kept = next((name for name in RUN_FILES if (output / name).exists()), None)
    if kept is not None and not (resume or overwrite):
        raise FileExistsError(
            f"{output} holds a run ({kept}); expected --resume to go on with it, --overwrite to start anew, or another "
            "--output"
        )
    splits = load_splits(config)
    selection = splits.test if config.evaluation.split == "test" else splits.validation
    extra = None if config.data.extra is None else load_npz(Path(config.data.extra).expanduser())[0]
    progress = TrainingProgress(console, config)
    try:
        result = train(
            config,
            splits.train,
            selection,
            splits.classes,
            extra=extra,
            output=output,
            resume=resume,
            on_epoch=progress.on_epoch,
            on_step=progress.on_step,
        )
    finally:
        progress.close()
    if result.rank == 0:
        _conclude(config, output, console, result)
    return result.stopped


def _conclude(config: RunConfig, output: Path, console: Console, result: TrainResult) -> None:
    record = {
        "config": config.model_dump(mode="json"),
        "environment": environment(),
        "engine": result.engine,
        "stopped": result.stopped,
        "costs": vars(result.costs),
        "best": None if result.best is None else result.best.as_dict(),
        "last": result.history[-1].as_dict() if result.history else None,
    }
    write_json(output / "run.json", record)
    if result.stopped is not None and result.stopped.startswith("SIG"):
        step = "emr train --resume --output"
        console.print(f"stopped by {result.stopped}; go on with: {step} {output}", highlight=False, soft_wrap=True)
        return
    parts = [f"{result.seconds:.1f} s"]
    if result.stopped == "patience":
        parts.append(f"stopped early, {config.trainer.patience} validations without a better one")
    if result.best is not None:
        parts.append(f"best epoch {result.best.epoch}")
    names = "best.pt and last.pt" if result.best is not None else "last.pt"
    console.print(f"{'; '.join(parts)}; saved {names} in {output}", highlight=False, soft_wrap=True)
