"""The run of an ensemble of attacks over a set of images."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from emr_training.attacks import flags
from emr_training.attacks.balls import Ball
from emr_training.attacks.base import Attack
from emr_training.attacks.classifier import Classifier
from emr_training.attacks.problem import Problem
from emr_training.attacks.report import Report
from emr_training.attacks.square import Square
from emr_training.attacks.state import ROBUST, WRONG, Record, Saver, State, foreign
from emr_training.attacks.suite import for_classes
from emr_training.errors import check_logits

#: So many images' logits tell one model from another.
_PROBED = 16


class Evaluation:
    """Runs attacks one after another, each on the images that have survived so far, gathered anew into batches.

    Random numbers belong to an image, an attack and the seed: neither the batch size nor what else survived changes
    them.
    """

    def __init__(
        self,
        attacks: Mapping[str, Attack],
        ball: Ball,
        classifier: Classifier,
        x: Tensor,
        y: Tensor,
        *,
        device: torch.device,
        batch_size: int,
        seed: int,
        report: Report,
        saver: Saver,
    ) -> None:
        self._attacks, self._ball, self._classifier = dict(attacks), ball, classifier
        self._x, self._y = x, y
        self._device, self._batch_size, self._seed = device, batch_size, seed
        self._report, self._saver = report, saver

    def begin(self) -> State:
        """The state after the clean images have been classified.

        Raises:
            ValueError: if the model returns no logits [N, C], or NaN, or has fewer classes than the labels say.
        """
        self._seed_model(self._seed)
        predicted = []
        for rows in torch.arange(len(self._y)).split(self._batch_size):
            x, y = self._batch(rows)
            logits = self._classifier.plain_logits(x)
            check_logits(logits, y)
            predicted.append(logits.argmax(1).cpu())
        classes = torch.cat(predicted)
        broken_by = torch.where(classes == self._y.cpu(), ROBUST, WRONG)
        records = [Record(name) for name in self._attacks]
        tried = torch.zeros_like(broken_by, dtype=torch.bool)
        return State(broken_by, classes, tried, self._x.clone(), records, self._probe())

    def recognise(self, state: State) -> None:
        """Raise ValueError unless the model gives the logits that are in a restored state.

        Of a plain callable there are no parameters to compare.
        """
        there, here = state.probe, self._probe()
        # Another batch size, device or library rounds otherwise.
        tolerance = 0.01 * float(there.nan_to_num(0.0, 0.0, 0.0).abs().max())
        if there.shape != here.shape or not torch.allclose(here, there, rtol=0, atol=tolerance, equal_nan=True):
            raise foreign(self._saver.path, "model", ": the logits of the first images differ")

    def _probe(self) -> Tensor:
        self._seed_model(self._seed)
        x, _ = self._batch(torch.arange(min(len(self._y), _PROBED)))
        return self._classifier.plain_logits(x).double().cpu()

    def run(self, state: State, *, check: bool) -> None:
        """Run what is left to run; `check`: look for signs of a faulty evaluation, too."""
        classes = self._classifier.plain_logits(self._batch(torch.arange(1))[0]).shape[1]
        if check and not state.checked:
            for text in self._signs(state):
                self._warn(state, text)
            state.checked = True
        try:
            for number, (name, attack) in enumerate(self._attacks.items()):
                if not state.records[number].done:
                    attack, change = for_classes(attack, classes)
                    if change is not None:
                        self._report.line(f"{name} takes {change}")
                    self._run_attack(state, number, attack, check)
        except BaseException:
            # Also at Ctrl-C: the last batch that was finished.
            self._saver(state, now=True)
            raise
        self._saver(state, now=True)

    def _batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.to(self._x.device)
        return self._x[rows].to(self._device), self._y[rows].to(self._device)

    def _warn(self, state: State, text: str) -> None:
        state.warnings.append(text)
        self._report.warn(text)

    def _signs(self, state: State) -> list[str]:
        """Signs of a faulty evaluation on the first images."""
        self._seed_model(self._seed)
        x, y = self._batch(torch.arange(min(len(self._y), self._batch_size)))
        problem = Problem(self._classifier, x, y, None, torch.Generator(self._device))
        found = [flags.probabilities(self._classifier.plain_logits(x)), flags.dynamic(problem)]
        expects_random = any(getattr(attack, "eot", 1) > 1 for attack in self._attacks.values())
        if not expects_random:
            found.append(flags.randomized(problem))
        if any(not isinstance(attack, Square) for attack in self._attacks.values()):
            found.append(flags.zero_gradients(problem))
        return [text for text in found if text is not None]

    def _run_attack(self, state: State, number: int, attack: Attack, check: bool) -> None:
        record = state.records[number]
        before = int(state.robust.sum()) + record.broken
        nans = int(self._classifier.nans)
        rows = (state.robust & ~state.tried).nonzero().squeeze(1)
        batches = rows.split(self._batch_size) if rows.numel() else ()
        done = math.ceil(record.attacked / self._batch_size)
        keys = self._keys(record.name)
        self._report.begin(record.name, record.attacked + len(rows))
        self._report.advance(record.attacked, self._accuracy(state))
        for place, batch in enumerate(batches, done + 1):
            broken = self._attack_batch(state, number, attack, batch, keys)
            self._saver(state)
            text = f"{record.name} - {place}/{done + len(batches)} - {broken} out of {len(batch)}"
            self._report.line(f"{text} successfully perturbed")
            self._report.advance(len(batch), self._accuracy(state))
        record.done = True
        state.tried.zero_()
        seconds = sum(entry.seconds for entry in state.records)
        accuracy = self._accuracy(state)
        self._report.line(f"robust accuracy after {record.name.upper()}: {accuracy:.2%} (total time {seconds:.1f} s)")
        met = flags.met_nan(record.name, int(self._classifier.nans) - nans) if check else None
        if met is not None:
            self._warn(state, met)
        by_gradient = [a for a in list(self._attacks.values())[:number] if not isinstance(a, Square)]
        if check and isinstance(attack, Square) and by_gradient:
            sign = flags.square_lowered(before / len(self._y), accuracy)
            if sign is not None:
                self._warn(state, sign)
        self._saver(state)

    def _attack_batch(self, state: State, number: int, attack: Attack, rows: Tensor, keys: Tensor) -> int:
        """Attack the images `rows`; how many it broke."""
        record, classifier = state.records[number], self._classifier
        forwards, backwards, begin = classifier.forwards, classifier.backwards, time.perf_counter()
        x, y = self._batch(rows)
        seed = self._seed_of(record.name)
        self._seed_model(seed + int(rows[0]))
        generator = torch.Generator(self._device).manual_seed(seed)
        problem = Problem(classifier, x, y, None, generator, keys[rows].to(self._device))
        x_adv = attack.verify(attack.search(problem).detach(), x)
        self._ball.check(x_adv, x)
        logits = classifier.plain_logits(x_adv)
        broken = problem.judged(logits).nonzero().squeeze(1)
        hit = rows[broken.cpu()]
        state.x_adv[hit.to(self._x.device)] = x_adv[broken].to(self._x.device)
        state.broken_by[hit] = number
        state.predicted[hit] = logits[broken].argmax(1).cpu()
        state.tried[rows] = True
        record.attacked += len(rows)
        record.broken += len(hit)
        record.forwards += classifier.forwards - forwards
        record.backwards += classifier.backwards - backwards
        record.seconds += time.perf_counter() - begin
        return len(hit)

    def _seed_model(self, seed: int) -> None:
        """For models that draw from the global generators, which whoever lends the model restores."""
        torch.default_generator.manual_seed(seed % 2**63)
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed % 2**63)

    def _accuracy(self, state: State) -> float:
        return int(state.robust.sum()) / len(self._y)

    def _seed_of(self, name: str) -> int:
        return (self._seed * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode())) % 2**63

    def _keys(self, name: str) -> Tensor:
        """Each image's key of random numbers in this attack, [N]; from the CPU, so that all devices have the same."""
        generator = torch.Generator().manual_seed(self._seed_of(name))
        return torch.randint(2**62, (len(self._y),), generator=generator)
