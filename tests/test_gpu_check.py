"""The GPU check's bookkeeping: order, limits, and going on where an earlier call stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Part, State, run_all, run_part

PASSED = {"status": "passed", "seconds": 1.0}
FAILED = {"status": "failed", "seconds": 1.0, "why": "exit status 1", "tail": "words"}


def three(folder: Path) -> list[Part]:
    return [
        Part("build", (), 10, alone=True, needs=()),
        Part("tests", (), 10),
        Part("timing", (), 10, alone=True, output=str(folder / "timing.json")),
    ]


class Runner:
    """Passes every part but those named, and writes what a part should write."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.ran: list[str] = []

    def __call__(self, part: Part, limit: float) -> dict[str, Any]:
        self.ran.append(part.name)
        if part.output:
            Path(part.output).write_text("{}")
        return FAILED if part.name in self.failing else PASSED


def test_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = Runner("timing"), Runner(), Runner()
    todo = three(tmp_path)
    assert not run_all(todo, State(tmp_path, "a"), first, 5, 2)
    assert first.ran == ["build", "tests", "timing"] and "words" in capsys.readouterr().out
    # A machine may be a new one: the build is looked at every time.
    assert run_all(todo, State(tmp_path, "a"), second, 5, 2)
    assert second.ran == ["build", "timing"]
    assert run_all(todo, State(tmp_path, "a"), third, 5, 2)
    assert third.ran == ["build"]


def test_starts_over_with_other_sources_or_a_damaged_file(tmp_path: Path) -> None:
    run_all(three(tmp_path), State(tmp_path, "a"), Runner(), 5, 2)
    for key, damage in (("b", False), ("a", True)):
        if damage:
            (tmp_path / "state.json").write_text("{")
        runner = Runner()
        run_all(three(tmp_path), State(tmp_path, key), runner, 5, 2)
        assert runner.ran == ["build", "tests", "timing"]


def test_figures_that_are_gone_are_measured_again(tmp_path: Path) -> None:
    run_all(three(tmp_path), State(tmp_path, "a"), Runner(), 5, 2)
    (tmp_path / "timing.json").unlink()
    runner = Runner()
    run_all(three(tmp_path), State(tmp_path, "a"), runner, 5, 2)
    assert runner.ran == ["build", "timing"]


def test_nothing_is_run_on_a_failed_build(tmp_path: Path) -> None:
    runner, state = Runner("build"), State(tmp_path, "a")
    assert not run_all(three(tmp_path), state, runner, 5, 2)
    assert runner.ran == ["build"] and state.outcomes["tests"]["why"] == "needs build"


def test_what_does_not_fit_is_left(tmp_path: Path) -> None:
    runner, state = Runner(), State(tmp_path, "a")
    assert not run_all(three(tmp_path), state, runner, 5 / 60, 2)
    assert runner.ran == [] and state.outcomes["build"]["status"] == "left"


def test_parts_are_processes_with_limits(tmp_path: Path) -> None:
    good = run_part(Part("good", ("-c", "print('fine')"), 5), tmp_path, {}, 60)
    assert good["status"] == "passed" and "fine" in good["tail"]
    bad = run_part(Part("bad", ("-c", "raise SystemExit('words')"), 5), tmp_path, {}, 60)
    assert bad["status"] == "failed" and bad["why"] == "exit status 1" and "words" in bad["tail"]
    slow = run_part(Part("slow", ("-c", "import time; time.sleep(60)"), 5), tmp_path, {}, 0.5)
    assert slow["status"] == "failed" and "over its limit" in slow["why"]
    without = run_part(Part("tool", ("-c", ""), 5, tool=("no-such-program",)), tmp_path, {}, 60)
    assert without["status"] == "skipped" and "no-such-program" in without["why"]


def test_every_part_names_something_that_exists(tmp_path: Path) -> None:
    names = [part.name for part in gpu_check.parts("cuda", tmp_path, False)]
    assert len(set(names)) == len(names)
    for part in gpu_check.parts("cuda", tmp_path, False):
        words = [word.removeprefix("--ignore=") for word in part.command]
        paths = [word for word in words if word.startswith("tests/")]
        assert all((gpu_check.ROOT / path).exists() for path in paths)
        assert set(part.needs) <= set(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_needs_a_gpu() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    result = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert result.returncode != 0 and "needs a CUDA device" in result.stderr


def test_the_record_holds_everything(tmp_path: Path) -> None:
    todo, state = three(tmp_path), State(tmp_path, "a")
    run_all(todo, state, Runner(), 5, 2)
    file = gpu_check.write_record(todo, state, tmp_path, torch.device("cpu"))
    record = json.loads(file.read_text())
    assert set(record["parts"]) == {"build", "tests", "timing"} and record["figures"] == {"timing": {}}
    assert record["environment"]["torch"] == torch.__version__
