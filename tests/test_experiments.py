"""The experiments end to end on a few digits: every part's results, resuming, the report; and their statistics."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

from experiments import jobs as jobs_module
from experiments.cifar10 import __main__ as cifar10
from experiments.cifar10.deadline import TimeUp, deadline
from experiments.cifar10.runs import NAMES, configuration, parse_names
from experiments.jobs import Clock, Job, run_jobs
from experiments.markers import fill, table
from experiments.mnist import __main__ as mnist
from experiments.mnist.diagnosis import CRITERIA, verdict
from experiments.mnist.plan import Plan
from experiments.mnist.settings import QUICK, Settings
from experiments.mnist.spec import EMR, Spec, at_equal_cost
from experiments.mnist.spec import configuration as mnist_configuration
from experiments.mnist.tables import tables
from experiments.nets import cnn, mlp
from experiments.statistics import bootstrapped, paired, spearman, spread

README = Path(mnist.__file__).parent / "README.md"
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of `--quick`, and beside them a copy of the README with its tables filled."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "README.md").write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    mnist.run(folder / "results", quick=True, readme=folder / "README.md")
    return folder


def test_quick_makes_each_part(quick: Path) -> None:
    plan = Plan(quick / "results", QUICK)
    choices = plan.choices()
    stages = [*plan.sweep_stages(), *plan.runoff_stages(plan.finalists())]
    stages += [stage for part in ("final", "ablation", "masking") for stage in plan.stages(part, choices)]
    for _, wanted in stages:
        assert wanted
        assert all(job.done for job in wanted)
    results = json.loads((quick / "results" / "report" / "results.json").read_text())
    assert results["missing"] == []
    assert {*results["sweep"]} == {"mlp standard", "mlp AT 0.1", "mlp-bn AT 0.1", "mlp AT 0.1, few images"}
    finals = plan.final_specs(choices)
    assert {*results["final"]} == {*finals}
    assert "mlp-bn AT 0.1, equal cost" in finals
    assert all(found["seeds"] == [0, 1] for found in results["final"].values())
    assert len(results["masking"]["models"]) == 2 * len(finals)
    assert {*results["predict"]["0.1"]["probabilistic margin"]} == {
        "rho",
        "low95",
        "high95",
        "models",
        "configurations",
    }
    assert {path.name for path in (quick / "results" / "report").glob("*.png")} == {
        "ablation.png",
        "accuracy_mlp.png",
        "curves.png",
        "margins_mlp.png",
        "predict.png",
        "surface_mlp.png",
    }


def test_report_fills_the_readme_and_leaves_the_text(quick: Path) -> None:
    before, after = README.read_text(encoding="utf-8"), (quick / "README.md").read_text(encoding="utf-8")
    assert before.splitlines()[0] == after.splitlines()[0]
    assert "| mlp AT 0.1 + EMR |" in after
    assert [line for line in after.splitlines() if line.startswith("## ")] == [
        line for line in before.splitlines() if line.startswith("## ")
    ]


def test_run_again_makes_nothing_again(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Job) -> float:
        raise AssertionError(f"{self.path} made again")

    monkeypatch.setattr(jobs_module.Job, "make", never)
    mnist.run(quick / "results", quick=True)


def test_other_settings_are_refused(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "QUICK", Settings(**{**vars(QUICK), "epochs": 3}))
    with pytest.raises(ValueError, match="other epochs"):
        mnist.run(quick / "results", quick=True)


def test_missing_results_are_told(quick: Path, tmp_path: Path) -> None:
    from experiments.mnist.results import Collector

    plan = Plan(quick / "results", QUICK)
    gone = next((quick / "results" / "autoattack").glob("mlp_at0.1_e2_s1*.json"))
    kept = gone.read_text()
    gone.unlink()
    try:
        results = Collector(plan, plan.choices()).all()
    finally:
        gone.write_text(kept)
    assert results["missing"] == [f"autoattack/{gone.name}"]
    assert "mlp AT 0.1" not in results["final"]
    assert "missing" in tables(results)["runs"]


def test_parts_are_checked_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'sweep'"):
        mnist.run(tmp_path / "none", quick=True, parts="swep")
    assert not (tmp_path / "none").exists()


def test_absent_data_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMR_DATA", raising=False)
    with pytest.raises(ValueError, match="EMR_DATA is not set"):
        mnist.run(tmp_path / "none")


def _square(number: int) -> dict[str, Any]:
    return {"square": number**2}


@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_make_what_is_missing(tmp_path: Path, processes: int) -> None:
    wanted = [Job(tmp_path / f"{n}.json", "square", _square, (n,)) for n in range(3)]
    (tmp_path / "1.json").write_text('{"seconds": 1.0, "square": "kept"}')
    run_jobs("squares", [*wanted, wanted[0]], processes, Clock(), QUIET)
    assert [jobs_module.read(job.path)["square"] for job in wanted] == [0, "kept", 4]


def test_killed_run_leaves_no_process(tmp_path: Path) -> None:
    wanted = [Job(tmp_path / f"{i}.json", "wait", waiting, (tmp_path / f"{i}.pid",)) for i in range(2)]
    parent = multiprocessing.get_context("spawn").Process(target=run_quietly, args=(wanted,))
    parent.start()
    until(lambda: all((tmp_path / f"{i}.pid").exists() and (tmp_path / f"{i}.pid").read_text() for i in range(2)))
    parent.kill()
    parent.join()
    workers = [int((tmp_path / f"{i}.pid").read_text()) for i in range(2)]
    until(lambda: not any(alive(worker) for worker in workers))


def run_quietly(wanted: list[Job]) -> None:
    """In two processes."""
    run_jobs("waiting", wanted, 2, Clock(), QUIET)


def waiting(path: Path) -> dict[str, Any]:
    """Longer than any test."""
    path.write_text(str(os.getpid()))
    time.sleep(600)
    return {}


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended may wait for whoever inherited it."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that takes seconds; fail after two minutes."""
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(("defense", "epochs"), [("standard", 24), ("at", 11), ("trades", 11)])
def test_equal_cost_counts_the_penalty_passes(defense: str, epochs: int) -> None:
    # The penalty's two passes beside 1, 5 + 1 and 5 + 2 of the method: 8 epochs become 24, 10.67 and 10.29.
    given = Settings(data="digits", epochs=8, attack_steps=5)
    spec = Spec("mlp", defense, 0.0 if defense == "standard" else 0.1, None, 0, 8)
    assert at_equal_cost(spec, given).epochs == epochs


def test_larger_radii_begin_with_a_smaller_one() -> None:
    given = Settings(data="digits")
    small, large = (mnist_configuration(Spec("mlp", "at", e, EMR(3, 1, True), 0, 8), given) for e in (0.1, 0.3))
    assert small.defense.burn_in is None
    assert large.defense.burn_in is not None and large.defense.burn_in.attack is not None
    assert (large.defense.burn_in.epoch, large.defense.burn_in.attack.epsilon) == (4, 0.1)
    assert large.penalties.emr is not None and large.penalties.emr.center


def test_batch_norm_is_before_each_relu() -> None:
    for model in (mlp((1, 8, 8), 3, (4, 5), batch_norm=True), cnn((1, 8, 8), 3, 2, batch_norm=True)):
        layers = [layer for layer in model.modules() if not list(layer.children())]
        relus = [i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
        assert relus and all(isinstance(layers[i - 1], (nn.BatchNorm1d, nn.BatchNorm2d)) for i in relus)
        assert model(torch.rand(4, 1, 8, 8)).shape == (4, 3)


def test_spearman_is_the_correlation_of_ranks() -> None:
    assert spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    # Ranks 1, 2.5, 2.5, 4 against 4, 1, 2, 3: deviations -1.5, 0, 0, 1.5 and 1.5, -1.5, -0.5, 0.5.
    assert spearman([0, 1, 1, 5], [9, 1, 2, 3]) == pytest.approx(-1.5 / (4.5 * 5) ** 0.5)
    assert spearman([1, 1], [1, 2]) is None


def test_intervals_draw_whole_configurations() -> None:
    # Two configurations of a hundred equal seeds are two points: every draw's correlation is 1 or undefined.
    a, groups = [0.0] * 100 + [1.0] * 100, ["a"] * 100 + ["b"] * 100
    found = bootstrapped(a, a, groups, draws=20)
    assert (found["rho"], found["low95"], found["configurations"]) == (pytest.approx(1), pytest.approx(1), 2)
    noise = torch.rand(8, 2, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [row for row in noise for _ in range(50)]
    found = bootstrapped([x for x, _ in rows], [y for _, y in rows], [str(i // 50) for i in range(400)], draws=200)
    assert found["high95"] - found["low95"] > 0.5


def test_spreads() -> None:
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert spread([1.0])["std"] is None
    assert (paired([1, 2, 3], [2, 2, 5])["values"], paired([1, 2, 3], [2, 2, 5])["larger"]) == ([1, 0, 2], 2)


SOUND: dict[str, Any] = {
    "white_box": 0.5,
    "square": 0.6,
    "transfer": {"other": 0.7},
    "curve": [[0.0, 0.9], [0.1, 0.5], [0.2, 0.0]],
    "pgd": 0.55,
    "pgd_restarts": 0.54,
    "distances": {"fab": {"rho": 0.9, "median_ratio": 1.1}},
}


@pytest.mark.parametrize(
    ("criterion", "change", "warnings"),
    [
        ("square", {"square": 0.48}, []),
        ("transfer", {"transfer": {"a": 0.9, "b": 0.48}}, []),
        ("monotone", {"curve": [[0.0, 0.5], [0.1, 0.6], [0.2, 0.0]]}, []),
        ("unbounded", {"curve": [[0.0, 0.9], [1.0, 0.1]]}, []),
        ("restarts", {"pgd_restarts": 0.5}, []),
        ("margin", {"distances": {"fab": {"rho": 0.3, "median_ratio": 1.1}}}, []),
        ("margin", {"distances": {"fab": {"rho": 0.9, "median_ratio": 4.0}}}, []),
        ("warnings", {}, ["zero gradients"]),
    ],
)
def test_verdict_names_what_failed(criterion: str, change: dict[str, Any], warnings: list[str]) -> None:
    assert verdict(SOUND, []) == {
        "criteria": dict.fromkeys(CRITERIA, True),
        "failed": [],
        "verdict": "no sign of masking",
    }
    found = verdict({**SOUND, **change}, warnings)
    assert (found["failed"], found["verdict"]) == ([criterion], "suspect")


def test_fill_needs_both_markers(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n")
    fill(path, {"a": table(["x", "y"], [["1", "2"]])})
    assert path.read_text() == "before\n<!-- a -->\n| x | y |\n| --- | ---: |\n| 1 | 2 |\n<!-- /a -->\nafter\n"
    with pytest.raises(ValueError, match="0 pairs of markers <!-- b -->"):
        fill(path, {"b": ""})


def test_deadline_interrupts_or_asks_training_to_stop() -> None:
    with pytest.raises(TimeUp), deadline(0.001):
        time.sleep(60)
    asked = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        with deadline(0.001):
            until = time.monotonic() + 60
            while not asked and time.monotonic() < until:
                pass
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked[0] == signal.SIGTERM


def test_every_cifar_run_has_a_preset() -> None:
    given: dict[str, Any] = {"root": None, "seed": 3, "smoke": False, "device": "cpu", "precision": "32", "changes": []}
    for name in NAMES:
        config = configuration(name, epochs=None, **given)
        assert (config.penalties.emr is not None) == name.endswith("-emr")
        assert config.trainer.seed == 3
    short = configuration("preactresnet-18-mail-at-emr", epochs=24, **given)
    assert short.defense.burn_in is not None
    # Of 120 epochs: milestones 75, 90 and 100, MAIL from epoch 76.
    assert (short.schedule.milestones, short.defense.burn_in.epoch) == ((15.0, 18.0, 20.0), 16)
    with pytest.raises(ValueError, match="did you mean 'preactresnet-18-at'"):
        parse_names("preactresnet-18-ta")


def test_cifar_goes_on_where_time_was_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.cifar10 import data

    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(96, 3, 32, 32, generator=generator), torch.arange(96) % 10
    monkeypatch.setattr(data, "few", lambda: (TensorDataset(x, y), TensorDataset(x[:12], y[:12])))
    monkeypatch.setenv("EMR_DATA", str(tmp_path))
    arguments = ["--output", str(tmp_path / "out"), "--smoke", "--device", "cpu", "--images", "2", "model.name=mlp"]
    app = typer.Typer()
    app.command()(cifar10.run)
    first = CliRunner().invoke(app, [*arguments, "--max-minutes", "0"], catch_exceptions=False)
    assert "0 minutes are over" in first.output
    assert json.loads((tmp_path / "out" / "results.json").read_text())["smoke"] is True
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {*results["models"]} == {"preactresnet-18-at", "preactresnet-18-at-emr"}
    for entry in results["models"].values():
        assert entry["trained"]["stopped"] is None
        assert {*entry["evaluated"]["attacks"]} == {"pgd20", "autoattack"}
    assert (tmp_path / "out" / "comparison" / "comparison.json").is_file()
    state = (tmp_path / "out" / "models" / "preactresnet-18-at" / "last.pt").stat().st_mtime_ns
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert (tmp_path / "out" / "models" / "preactresnet-18-at" / "last.pt").stat().st_mtime_ns == state
    with pytest.raises(ValueError, match="another configuration"):
        CliRunner().invoke(app, [*arguments, "trainer.seed=5"], catch_exceptions=False)
