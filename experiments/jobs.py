"""Results on disk, one JSON file each, made by several processes; what is there is not made again."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from emr_training.reporting import write_json


@dataclass(frozen=True)
class Job:
    """One result: what `function(*arguments)` returns, written to `path` as JSON with the seconds that it took.

    kind: jobs of one kind take about the same time, for the estimate of what is left. function: of a module, as another
    process imports it.
    """

    path: Path
    kind: str
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return self.path.is_file()

    def make(self) -> float:
        """Make the result; returns the seconds."""
        started = time.perf_counter()
        result = self.function(*self.arguments)
        seconds = time.perf_counter() - started
        write_json(self.path, {"kind": self.kind, "seconds": round(seconds, 3), **result})
        return seconds


def read(path: Path) -> dict[str, Any]:
    """A result. Raises FileNotFoundError where it has not been made."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


class Clock:
    """Mean seconds of each kind of job, over runs before this one, too."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}

    def add(self, kind: str, seconds: float) -> None:
        """One job's."""
        self._seconds.setdefault(kind, []).append(seconds)

    def left(self, jobs: Iterable[Job], processes: int) -> str:
        """What is left to do, in words."""
        total, unknown = 0.0, 0
        for job in jobs:
            known = self._seconds.get(job.kind)
            if known is None:
                unknown += 1
            else:
                total += sum(known) / len(known)
        text = f"about {total / processes / 60:.1f} min left"
        return f"{text} and {unknown} runs of unknown length" if unknown else text


def unique(jobs: Iterable[Job]) -> list[Job]:
    """Each result once: parts share models and evaluations."""
    return list({job.path: job for job in jobs}.values())


def run_jobs(title: str, jobs: Sequence[Job], processes: int, clock: Clock, console: Console) -> None:
    """Make what is missing, `processes` at a time with one thread each; a line for every result."""
    left: dict[Path, Job] = {}
    for job in unique(jobs):
        if job.done:
            clock.add(job.kind, read(job.path)["seconds"])
        else:
            left[job.path] = job
    total = len(unique(jobs))
    console.print(
        f"{title}: {total} results, {total - len(left)} of them there; {clock.left(left.values(), processes)}"
    )
    for job, seconds in _made(list(left.values()), processes):
        clock.add(job.kind, seconds)
        del left[job.path]
        console.print(
            f"{title} {total - len(left)}/{total}  {job.kind} {job.path.stem}  {seconds:.1f} s; "
            f"{clock.left(left.values(), processes)}",
            highlight=False,
            soft_wrap=True,
        )


def _made(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, float]]:
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, job.make()
        return
    # Threads of the parent do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin) as pool:
        futures = {pool.submit(job.make): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin() -> None:
    """In a process of the pool: one thread, and an end as soon as whoever started it is killed."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
