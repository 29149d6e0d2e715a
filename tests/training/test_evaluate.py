"""`emr evaluate`: each attack by name, per-image worst cases, margins, costs, records, and what can be gone on with."""

from __future__ import annotations

import json
import math
import re
import signal
from copy import deepcopy
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from emr_training.attacks import PGD, AutoAttack
from emr_training.attacks.result import summarize
from emr_training.attacks.state import Saver
from emr_training.attacks.suite import ATTACKS
from emr_training.checkpoint import CheckpointError, save_checkpoint
from emr_training.config import make_config
from emr_training.costs import Costs
from emr_training.data import Data, Splits
from emr_training.evaluation import Evaluation, Settings, evaluate, robust_accuracy
from emr_training.evaluation.command import Job, parse_epsilons, run
from emr_training.evaluation.measure import Measure
from emr_training.evaluation.names import NAMES, epsilon_text, label, named_attack, parse_attacks
from emr_training.evaluation.record import Record
from emr_training.evaluation.subject import Subject, load_subject
from emr_training.models import build_model
from emr_training.reporting import attacks_table, margins_table

QUIET = Console(quiet=True)


def job(attacks: str, epsilons: tuple[float, ...] = (0.1,), **options) -> Job:
    given = {name: options.pop(name) for name in ("seed", "margins", "norm") if name in options}
    return Job(
        Settings(parse_attacks(attacks), epsilons, **{"margins": False, **given}), torch.device("cpu"), **options
    )


@pytest.fixture
def saved(tmp_path: Path, net: nn.Module) -> Path:
    """A run's folder."""
    config = make_config({"attack.epsilon": 0.125})
    save_checkpoint(tmp_path / "run" / "last.pt", net, config, input_shape=(1, 8, 8), classes=10, metrics={})
    (tmp_path / "run" / "run.json").write_text(json.dumps({"costs": vars(Costs(seconds=3.0, forwards=7))}))
    return tmp_path / "run"


def test_names() -> None:
    assert parse_attacks(" clean,PGD20,pgd20, cw7x3") == ("clean", "pgd20", "cw7x3")
    assert [label(n) for n in ("pgd50x10", "cw", "fab-t", "autoattack")] == [
        "PGD-50×10",
        "CW-100",
        "FAB-T",
        "AutoAttack",
    ]
    for name in NAMES:
        if name != "clean":
            for norm in ("Linf", "L2"):
                if (name, norm) != ("cw-l2", "Linf"):
                    attack = named_attack(name, norm, 0.3, seed=5)
                    assert attack.seed == 5 and getattr(attack, "norm", "L2") == norm
    cw = named_attack("cw7x3", "L1", 2.0)
    assert isinstance(cw, PGD) and (cw.loss, cw.steps, cw.restarts, cw.norm) == ("cw", 7, 3, "L1")
    standard = AutoAttack(norm="Linf", eps=0.3, seed=0).attacks()
    assert all(named_attack(name, "Linf", 0.3, seed=0) == attack for name, attack in standard.items())


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        ("pgd20,autoatack", r"attacks has 'autoatack'; did you mean 'autoattack'"),
        ("pgd0", r"attacks has 'pgd0'"),
        ("pgd", r"did you mean 'pgd20'"),
        (",", r"attacks has no name"),
    ],
)
def test_unknown_names(attacks: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_attacks(attacks)


@pytest.mark.parametrize(
    ("attacks", "epsilons", "norm", "message"),
    [
        (("cw-l2",), (0.1,), "Linf", r"'cw-l2' with the norm Linf; expected L2, or 'cw'"),
        (("deepfool",), (0.1,), "L1", r"'deepfool' with the norm L1"),
        (("fgsm",), (), "Linf", r"eps is not given"),
        (("fgsm",), (0.1, -0.1), "Linf", r"eps is -0.1; expected a positive number"),
        (("fgsm",), (math.nan,), "Linf", r"eps is nan"),
    ],
)
def test_settings_that_do_not_suit(attacks, epsilons, norm, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(attacks, epsilons, norm)


def test_radii(saved: Path) -> None:
    run_of_ours = load_subject(saved, {})
    assert parse_epsilons(["8/255", "0.25"], run_of_ours) == (8 / 255, 0.25)
    assert parse_epsilons([], run_of_ours) == (0.125,)
    with pytest.raises(ValueError, match=r"eps is '8/2x5'; expected a number or a fraction"):
        parse_epsilons(["8/2x5"], run_of_ours)
    assert [epsilon_text(e) for e in (8 / 255, 0.2, 0.5, 128 / 255, 0.123456)] == [
        "8/255",
        "0.2",
        "0.5",
        "128/255",
        "0.1235",
    ]


def linear(count: int = 40) -> tuple[nn.Module, Data, torch.Tensor, torch.Tensor]:
    """A linear model, images of which some have the wrong label, the gap z_1 - z_0 and the weight difference."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    x = torch.rand(count, 1, 4, 4)
    difference = (model[1].weight[1] - model[1].weight[0]).detach()
    gap = x.flatten(1) @ difference + (model[1].bias[1] - model[1].bias[0]).detach()
    y = (gap > 0).long()
    y[:5] = 1 - y[:5]
    return model, Data(x, y), gap, difference


def test_margins_of_a_linear_model() -> None:
    model, data, gap, difference = linear()
    sign = torch.where(torch.arange(40) < 5, -1.0, 1.0)
    for norm, order in (("L2", 2), ("Linf", 1), ("L1", torch.inf)):
        found = evaluate(model, data, Settings(("clean",), margin_norm=norm, batch_size=16)).margins_at(0.0)
        assert found is not None and found.norm == norm
        torch.testing.assert_close(found.margins, sign * gap.abs() / difference.norm(order))
        p = model(data.x).softmax(1).detach()
        weights = p @ model[1].weight.detach()
        torch.testing.assert_close(found.weight_norms, torch.linalg.vector_norm(weights, order, dim=1))
        torch.testing.assert_close(found.probabilistic, sign * (p[:, 0] - p[:, 1]).abs())


def test_attacked_margins_are_those_of_the_end_points() -> None:
    model, data, _, difference = linear()
    data = Data(data.x.mul(0.5).add(0.25), data.y)  # so that the box takes nothing away
    clean, attacked = evaluate(model, data, Settings(("clean",), (0.02,))).margins
    # The whole ball's depth is lost: epsilon * ||w||_1 of the gap.
    expected = clean.margins - 0.02 * difference.norm(1) / difference.norm()
    torch.testing.assert_close(attacked.margins, expected, atol=1e-5, rtol=1e-4)
    assert attacked.epsilon == 0.02


def test_robust_means_right_before_and_after() -> None:
    model, data, gap, difference = linear()
    epsilon = float((gap.abs() / difference.norm(1)).median())
    found = evaluate(model, data, Settings(("fgsm", "pgd5", "deepfool"), (epsilon,), margins=False))
    assert found.clean.correct == 35
    x_adv = PGD(epsilon, steps=5)(model, data.x, data.y)
    expected = (model(x_adv).argmax(1) == data.y) & (torch.arange(40) >= 5)
    result = found.find("pgd5", epsilon)
    assert result is not None and torch.equal(result.robust, expected)
    assert result.accuracy == robust_accuracy(model, data, PGD(epsilon, steps=5))
    deep = found.find("deepfool", epsilon)
    assert deep is not None and deep.details["successes"] <= 35 and deep.details["median_distance"] > 0
    everything = torch.stack([a.robust for a in found.attacks]).all(0)
    assert found.worst(epsilon).correct == int(everything.sum())


def test_what_is_wrong_stays_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the attack ends at a point that is right."""
    model, data, _, _ = linear()
    monkeypatch.setattr(Measure, "_far", lambda self, attack, title: torch.full((40,), math.inf))
    found = evaluate(model, data, Settings(("fgsm", "deepfool"), (0.1,), margins=False))
    assert [a.accuracy.correct for a in found.attacks] == [35, 35]


def test_worst_case_is_of_each_image() -> None:
    def broken(name: str, bits: str) -> dict:
        accuracy = {"name": name, "epsilon": 0.1, "settings": {}, "costs": {}, "robust": bits}
        return accuracy

    found = Evaluation.from_dict(
        {
            "norm": "Linf",
            "clean": {"correct": "11110"},
            "attacks": [broken("fgsm", "01110"), broken("pgd5", "11010")],
            "margins": [],
            "costs": {"other": {}},
        }
    )
    assert (found.worst(0.1).correct, found.worst(0.1).total) == (2, 5)
    assert found.robust("fgsm") == {0.1: found.attacks[0].accuracy}


def test_nearest_successes_count_within_every_radius(net: nn.Module, batch: Data) -> None:
    found = evaluate(net, batch, Settings(("deepfool",), (0.02, 0.05, 1.0), "L2", margins=False))
    small, middle, large = (a.accuracy.correct for a in found.attacks)
    assert small > large == 0 and small >= middle
    assert found.attacks[0].costs.images == 64 and found.attacks[1].costs == Costs()


def test_costs_count_passes(net: nn.Module, batch: Data) -> None:
    found = evaluate(net, batch, Settings(("fgsm",), (0.1,), margins=False))
    assert (found.costs.forwards, found.costs.images) == (64, 64)
    fgsm = found.attacks[0].costs
    assert (fgsm.forwards, fgsm.backwards, fgsm.images) == (128, 64, 64)
    assert fgsm.seconds > 0 and fgsm.peak_memory_bytes > 0
    assert found.total_costs.forwards == 192


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack without its long attacks."""
    monkeypatch.setitem(ATTACKS, "standard", ("apgd-ce", "apgd-dlr"))


def test_autoattack_is_the_library_s(net: nn.Module, batch: Data, short: None) -> None:
    few = Data(batch.x[:16], batch.y[:16])
    found = evaluate(net, few, Settings(("autoattack",), (0.05,), margins=False, seed=2)).attacks[0]
    _, expected = AutoAttack(eps=0.05, seed=2, verbose=False).run(net, few.x, few.y)
    assert torch.equal(found.robust, expected.robust)
    assert [a["name"] for a in found.details["attacks"]] == ["apgd-ce", "apgd-dlr"]
    assert found.costs.forwards == sum(a.forwards for a in expected.attacks) > 100


def test_a_record_reads_back(saved: Path, tmp_path: Path) -> None:
    record = run(load_subject(saved, {}), job("pgd3", (0.1, 0.2), images=50, margins=True), QUIET)
    path = saved / "evaluation.json"
    again = Record.load(path)
    assert again.evaluation.as_dict() == json.loads(json.dumps(record.evaluation.as_dict()))
    assert again.subject == record.subject and again.belongs_to == record.belongs_to
    assert not again.whole and again.training is not None and again.training["seconds"] == 3.0
    assert torch.equal(again.evaluation.attacks[1].robust, record.evaluation.attacks[1].robust)
    text = path.read_text()
    assert '"margins": [0' in text and not re.search(r"^ *-?[\d.]+,?$", text, re.M), "a list of numbers is one line"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"evaluation.json is not an evaluation of `emr evaluate`"):
        Record.load(path)


def test_further_attacks_join_a_record(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = load_subject(saved, {})
    first = run(subject, job("pgd3", images=50), QUIET).evaluation
    monkeypatch.setattr(Measure, "correct", lambda self: pytest.fail("measured again"))
    both = run(subject, job("fgsm,pgd3", (0.1, 0.2), images=50), QUIET).evaluation
    names = [(a.name, a.epsilon) for a in both.attacks]
    assert names == [("pgd3", 0.1), ("fgsm", 0.1), ("fgsm", 0.2), ("pgd3", 0.2)]
    assert both.attacks[0].costs == first.attacks[0].costs


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (job("pgd3", images=40), r"with other images \(50, here 40\), data; expected the same, another --output"),
        (job("pgd3", images=50, seed=1), r"with other seed \(0, here 1\)"),
        (job("pgd3", images=50, norm="L2"), r"with other norm \(Linf, here L2\)"),
    ],
)
def test_a_record_of_something_else_is_kept(saved: Path, other: Job, message: str) -> None:
    subject = load_subject(saved, {})
    run(subject, job("pgd3", images=50), QUIET)
    before = (saved / "evaluation.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(subject, other, QUIET)
    assert (saved / "evaluation.json").read_bytes() == before
    run(subject, Job(other.settings, other.device, other.images, overwrite=True), QUIET)
    assert (saved / "evaluation.json").read_bytes() != before


def test_a_retrained_model_is_another(saved: Path, net: nn.Module, robust_net: nn.Module) -> None:
    run(load_subject(saved, {}), job("fgsm", images=50), QUIET)
    save_checkpoint(saved / "last.pt", robust_net, make_config({}), input_shape=(1, 8, 8), classes=10, metrics={})
    with pytest.raises(ValueError, match="with other model; expected"):
        run(load_subject(saved, {}), job("fgsm", images=50), QUIET)


def test_goes_on_after_being_killed(saved: Path, short: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The attacks that ended are in the record, and AutoAttack takes up its state; the outcome is the same."""
    subject = load_subject(saved, {})
    wanted = job("pgd3,autoattack", (0.05,), images=12)
    whole = run(subject, Job(wanted.settings, wanted.device, 12, tmp_path / "whole.json"), QUIET).evaluation
    saves = Saver.__call__

    def killed(self, state, *, now=False):
        saves(self, state, now=True)
        if state.records[0].done:
            raise KeyboardInterrupt(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            run(subject, wanted, QUIET)
    assert [a.name for a in Record.load(saved / "evaluation.json").evaluation.attacks] == ["pgd3"]
    assert (saved / "evaluation.json.autoattack-0.05.state").is_file()
    monkeypatch.setattr("emr_training.attacks.autoattack.summarize", counted := Counted())
    again = run(subject, wanted, QUIET).evaluation
    assert counted.first_records[0].done, "APGD-CE had ended before"
    assert [a.as_dict()["robust"] for a in again.attacks] == [a.as_dict()["robust"] for a in whole.attacks]
    assert not (saved / "evaluation.json.autoattack-0.05.state").exists()


class Counted:
    """summarize, which remembers the state that it was given first."""

    def __init__(self) -> None:
        self.first_records = []

    def __call__(self, state, settings):
        self.first_records = self.first_records or deepcopy(state.records)
        return summarize(state, settings)


def test_published_weights(tmp_path: Path, net: nn.Module, splits: Splits) -> None:
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "w.pt")
    subject = load_subject(tmp_path / "w.pt", {"model": {"name": "mlp"}, "data": {"name": "digits"}})
    assert subject.method == "weights" and subject.output == tmp_path / "w.evaluation.json"
    record = run(subject, job("fgsm"), QUIET)
    assert record.whole and record.training is None
    assert record.evaluation.clean.correct == int((net(splits.test.x).argmax(1) == splits.test.y).sum())
    with pytest.raises(ValueError, match=r"eps is not given"):
        parse_epsilons([], subject)


def test_subjects_that_do_not_fit(saved: Path, tmp_path: Path, net: nn.Module) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"none of the networks.*published weights need --data, others"):
        load_subject(tmp_path / "w.pt", {})
    with pytest.raises(ValueError, match=r"model is given without data"):
        load_subject(tmp_path / "w.pt", {"model": {"name": "mlp"}})
    with pytest.raises(ValueError, match=r"is not of this SmallCNN"):
        load_subject(tmp_path / "w.pt", {"model": {"name": "cnn"}, "data": {"name": "digits"}})
    known = build_model("wrn-10-1", (1, 8, 8), 10)
    torch.save(known.state_dict(), tmp_path / "known.pt")
    with pytest.raises(ValueError, match=r"known.pt has published weights; expected the data set"):
        load_subject(tmp_path / "known.pt", {})
    subject = load_subject(tmp_path / "known.pt", {"data": {"name": "digits"}})
    assert (subject.method, subject.config.model.name) == ("weights", "wrn-10-1")
    with pytest.raises(ValueError, match=r"trainer is given for a checkpoint; expected changes of data alone"):
        load_subject(saved, {"trainer": {"seed": 1}})
    with pytest.raises(FileNotFoundError, match=r"no best.pt in .*; it holds last.pt"):
        load_subject(saved, {}, which="best")
    other = {"data": {"name": "test_evaluate:make_wide"}}
    with pytest.raises(ValueError, match=r"the model of .*last.pt cannot take images \[2, 1, 9, 9\]"):
        load_subject(saved, other)


def test_best_and_last_have_records_of_their_own(saved: Path, net: nn.Module) -> None:
    assert load_subject(saved, {}).output == saved / "evaluation.json"
    save_checkpoint(saved / "best.pt", net, make_config({}), input_shape=(1, 8, 8), classes=10, metrics={})
    assert (load_subject(saved, {}).path.name, load_subject(saved, {}).output.name) == ("best.pt", "evaluation.json")
    last = load_subject(saved, {}, which="last")
    assert (last.path.name, last.output.name) == ("last.pt", "last.evaluation.json")


def test_data_that_a_checkpoint_names_is_not_imported(tmp_path: Path, net: nn.Module) -> None:
    config = make_config({"data": "test_evaluate:make_digits"})
    save_checkpoint(tmp_path / "m.pt", net, config, input_shape=(1, 8, 8), classes=10, metrics={})
    with pytest.raises(CheckpointError, match=r"has test_evaluate:make_digits as its data, .* expected --trust"):
        load_subject(tmp_path / "m.pt", {})
    assert len(load_subject(tmp_path / "m.pt", {}, trust=True).test) == 4
    assert len(load_subject(tmp_path / "m.pt", {"data": {"name": "digits"}}).test) == 539


def test_tables(saved: Path) -> None:
    subject: Subject = load_subject(saved, {})
    found = run(subject, job("pgd3,fgsm", (0.1,), images=50, margins=True), QUIET).evaluation
    console = Console(width=80, record=True, file=StringIO())
    console.print(attacks_table(found))
    console.print(margins_table(found))
    text = console.export_text()
    low, high = found.worst(0.1).interval()
    assert f"{100 * low:.2f} to {100 * high:.2f}" in text and "worst case" in text
    assert "…" not in text and "PGD-3" in text and "ε = 0.1" in text
    narrow = Console(width=64, record=True, file=StringIO())
    narrow.print(margins_table(found))
    text = narrow.export_text()
    quartiles = found.margins[1].quartiles()["margins"]
    assert "…" not in text and "ε = 0.1" in text and f"to {quartiles['q75']:.2g})" in text


def make_digits():
    return torch.utils.data.TensorDataset(torch.rand(20, 1, 8, 8), torch.arange(20) % 10)


def make_wide():
    return torch.utils.data.TensorDataset(torch.rand(20, 1, 9, 9), torch.arange(20) % 10)
