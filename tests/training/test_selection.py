"""Selection: the criterion, and that the test split cannot influence it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from emr_training import demo
from emr_training.config import make_config
from emr_training.data import Data, Splits
from emr_training.selection import Candidate, choose, select
from emr_training.training import TrainingDiverged


def candidate(strength: float, clean: float | None, *robust: float) -> Candidate:
    return Candidate(strength, 1.0, clean, dict(enumerate(robust)))


def test_choose_maximises_robustness_within_the_clean_tolerance() -> None:
    reference = candidate(0, 0.97, 0.5)
    candidates = [
        candidate(1, 0.97, 0.6, 0.2),
        candidate(2, 0.96, 0.6, 0.4),
        candidate(3, 0.95, 0.9, 0.9),
        candidate(4, None),
    ]
    assert choose(candidates, reference).strength == 2


def test_choose_without_an_eligible_candidate_takes_the_cleanest() -> None:
    candidates = [candidate(1, 0.5, 0.5), candidate(2, 0.6, 0.1), candidate(3, None)]
    assert choose(candidates, candidate(0, 0.97, 0.5)).strength == 2


def test_choose_breaks_ties_for_the_earlier() -> None:
    assert choose([candidate(1, 0.9, 0.5), candidate(2, 0.9, 0.5)], candidate(0, 0.9, 0.5)).strength == 1


def test_choose_fails_when_all_diverged() -> None:
    with pytest.raises(TrainingDiverged, match="with every strength and temperature"):
        choose([candidate(1, None)], candidate(0, 0.9, 0.5))


def test_select_reports_a_diverged_candidate_and_goes_on(splits: Splits) -> None:
    config = make_config({"penalties.emr": {}, "trainer.epochs": 2})
    result = select(
        config,
        splits.train,
        splits.validation,
        10,
        strengths=(1.0, 1e30),
        temperatures=(1.0,),
        epsilons=(0.1,),
    )
    good, bad = result.candidates
    assert good.clean is not None and bad.clean is None and bad.mean_robust == -1
    assert result.config == make_config({"penalties.emr.strength": 1.0, "trainer.epochs": 2})
    assert result.reference.strength == 0


class Sealed(Splits):
    """Splits whose test part may not be looked at before `opened`."""

    opened = False

    def __getattribute__(self, name: str):
        if name == "test" and not Sealed.opened:
            raise AssertionError("the test split was used before all choices were made")
        return super().__getattribute__(name)


def test_demo_opens_the_test_split_only_after_selection(
    splits: Splits, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def sealed(seed: int) -> Splits:
        return Sealed("digits", 10, splits.train, splits.validation, Data(splits.test.x, splits.test.y))

    selected = []

    def watched(config, *args, **kwargs):
        result = select(config, *args, **kwargs)
        selected.append(config.method)
        Sealed.opened = len(selected) == 2
        return result

    monkeypatch.setattr(Sealed, "opened", False)
    monkeypatch.setattr(demo, "load_digits", sealed)
    monkeypatch.setattr(demo, "select", watched)
    settings = demo.DemoSettings(
        epochs=1, attack_steps=2, attack_restarts=1, curve_spacing=0.5, strengths=(1.0,), strengths_at=(1.0,)
    )
    demo.run_demo(tmp_path, Console(quiet=True), settings)
    assert selected == ["emr", "at-emr"]
