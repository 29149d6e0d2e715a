"""The parts of an evaluation, each with its costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emr_kernels import effective_margins, effective_weight_norms
from emr_training.attacks import Attack, AutoAttack
from emr_training.attacks.balls import distance
from emr_training.attacks.tally import counting, record
from emr_training.costs import Costs, Meter
from emr_training.data import Data
from emr_training.errors import check_logits
from emr_training.evaluation.accuracy import parts
from emr_training.evaluation.names import UNBOUNDED, epsilon_text, settings_of
from emr_training.evaluation.result import AttackResult, Margins
from emr_training.evaluation.settings import Settings
from emr_training.guard import left_as_found, logits_of

NORM_TEMPERATURE = 1.0
_DUAL = {"Linf": 1.0, "L2": 2.0, "L1": float("inf")}

#: Told what runs, how many images it is through with, and of how many.
OnBatch = Callable[[str, int, int], None]


class Measure:
    """Measures `model` on `data`, on the device that both are on; leaves the model as it was found.

    states: a path before whose name AutoAttack keeps its state, to go on from after it was cut off.
    verbose: print AutoAttack's lines.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: Settings,
        *,
        states: Path | None = None,
        verbose: bool = False,
        on_batch: OnBatch | None = None,
    ) -> None:
        self._model, self._data, self._settings = model, data, settings
        self._states, self._verbose, self._on_batch = states, verbose, on_batch
        self._distances: dict[str, Tensor] = {}

    def correct(self) -> tuple[Tensor, Costs]:
        """Which images [N] are classified right as they are."""
        with self._metered() as meter:
            right = [self._right(part.x, part.y).cpu() for part in self._parts("clean")]
        return torch.cat(right), meter.read()

    def margins(self, epsilon: float) -> tuple[Margins, Costs]:
        """Effective and probabilistic margins and weight norms, at clean images for epsilon 0."""
        settings = self._settings
        order = _DUAL[settings.margin_norm]
        columns: list[list[Tensor]] = [[], [], []]
        with self._metered() as meter:
            for part in self._parts(f"margins at {epsilon_text(epsilon)}" if epsilon else "margins"):
                x, y = part.x, part.y
                if epsilon:
                    x = settings.margin_attack(epsilon)(self._model, x, y)
                logits = self._logits(x, y)
                p = logits.float().softmax(1)
                rivals = p.scatter(1, y[:, None], -1.0).amax(1)
                columns[0].append(effective_margins(self._model, x, y, ord=order).cpu())
                columns[1].append(effective_weight_norms(self._model, x, temperature=NORM_TEMPERATURE, ord=order).cpu())
                columns[2].append((p.gather(1, y[:, None]).squeeze(1) - rivals).cpu())
                # A backward pass for each rival, and one for the mix.
                record(2 * len(x), logits.shape[1] * len(x))
        margins, norms, probabilistic = (torch.cat(column) for column in columns)
        return Margins(epsilon, settings.margin_norm, margins, norms, probabilistic), meter.read()

    def attacked(self, name: str, epsilon: float, correct: Tensor) -> AttackResult:
        """One attack at one radius, of images of which those `correct` [N] are right to begin with."""
        attack = self._settings.attack(name, epsilon)
        if isinstance(attack, AutoAttack):
            return self._ensemble(name, attack, correct)
        costs = Costs()
        if name not in self._distances:
            with self._metered() as meter:
                found = self._far(attack, f"{name} at {epsilon_text(epsilon)}")
            costs = meter.read()
            if name in UNBOUNDED:
                self._distances[name] = found
        details: dict[str, Any] = {}
        if name in UNBOUNDED:
            found = self._distances[name]
            near = found[correct & found.isfinite()]
            median = float(near.median()) if len(near) else None
            details = {"successes": len(near), "median_distance": median}
        survived = found > epsilon if name in UNBOUNDED else found.isinf()
        return AttackResult(name, epsilon, settings_of(attack), correct & survived, costs, details)

    def state_path(self, name: str, epsilon: float) -> Path | None:
        """Where AutoAttack keeps its state at this radius."""
        if self._states is None:
            return None
        return self._states.with_name(f"{self._states.name}.{name}-{epsilon:.6g}.state")

    def _ensemble(self, name: str, attack: AutoAttack, correct: Tensor) -> AttackResult:
        settings, device = self._settings, self._data.x.device
        told = replace(attack, verbose=self._verbose, batch_size=settings.batch_size, device=device)
        with self._metered() as meter:
            x = self._data.images()
            path = self.state_path(name, attack.eps)
            _, result = told.run(self._model, x, self._data.y, state_path=path)
        costs = replace(
            meter.read(),
            # Those of the attacks: the time before an interruption, too.
            seconds=result.seconds,
            device_seconds=result.seconds,
            forwards=sum(a.forwards for a in result.attacks),
            backwards=sum(a.backwards for a in result.attacks),
        )
        details = {key: value for key, value in result.as_dict().items() if key in ("attacks", "warnings")}
        return AttackResult(name, attack.eps, settings_of(attack), correct & result.robust, costs, details)

    def _far(self, attack: Attack, title: str) -> Tensor:
        """How far away the attack's success on each image is, [N]; infinity without one."""
        far = []
        for part in self._parts(title):
            x_adv = attack(self._model, part.x, part.y)
            away = distance(self._settings.norm, x_adv, part.x)
            far.append(away.masked_fill(self._right(x_adv, part.y), torch.inf).cpu())
        return torch.cat(far)

    def _right(self, x: Tensor, y: Tensor) -> Tensor:
        """Which images the model classifies right, [N]."""
        return self._logits(x, y).argmax(1) == y

    def _logits(self, x: Tensor, y: Tensor) -> Tensor:
        """The model's own logits [N, C], without autocast."""
        with left_as_found(self._model, x.device), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            logits = logits_of(self._model, x)
        check_logits(logits, y)
        record(len(x), 0)
        return logits

    def _parts(self, title: str) -> Iterator[Data]:
        done, total = 0, len(self._data)
        for part in parts(self._data, self._settings.batch_size):
            if self._on_batch is not None:
                self._on_batch(title, done, total)
            yield part
            done += len(part)
        if self._on_batch is not None:
            self._on_batch(title, total, total)

    @contextmanager
    def _metered(self) -> Iterator[Meter]:
        meter = Meter(self._data.x.device, 1)
        meter.images = len(self._data)
        with counting(meter.tally):
            yield meter
