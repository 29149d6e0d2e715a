"""What an evaluation tells while it runs: lines, a progress bar, warnings."""

from __future__ import annotations

import warnings
from datetime import datetime
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emr_training.attacks.flags import EvaluationWarning


class Report:
    """Prints lines and a progress bar if `verbose`, and appends the lines to the file `log_path`, its folder made."""

    def __init__(self, verbose: bool, log_path: str | Path | None = None, console: Console | None = None) -> None:
        self._verbose, self._log_path = verbose, log_path
        if log_path is not None:
            Path(log_path).parent.mkdir(parents=True, exist_ok=True)
        self._console = console or Console(highlight=False, soft_wrap=True)
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
        self._progress = Progress(
            *columns,
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not verbose or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", status="")

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def line(self, text: str) -> None:
        """Print a line."""
        if self._verbose and self._console.is_terminal:
            self._console.print(text, markup=False)
        elif self._verbose:
            # As it is: rich would make blanks of the tabs that scripts look for.
            print(text, file=self._console.file)
        if self._log_path is not None:
            with open(self._log_path, "a") as log:
                log.write(f"{datetime.now().isoformat(' ', 'seconds')} {text}\n")

    def warn(self, text: str) -> None:
        """Issue an `EvaluationWarning`; with lines one of them, too."""
        self.line(f"Warning: {text}")
        warnings.warn(text, EvaluationWarning, stacklevel=2)

    def begin(self, name: str, total: int) -> None:
        """An attack begins, on `total` images."""
        self._progress.reset(self._task, description=name, total=total, status="")

    def advance(self, images: int, robust_accuracy: float) -> None:
        """An attack is done with some images; the robust accuracy (a fraction) as far as it is known."""
        self._progress.update(self._task, advance=images, status=f"robust accuracy {robust_accuracy:.2%}")
