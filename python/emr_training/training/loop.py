"""Epochs and steps, and what is kept of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from emr_training.checkpoint import save_checkpoint, write_atomically
from emr_training.config import RunConfig, dump_config
from emr_training.costs import Meter
from emr_training.data import Data
from emr_training.defenses import Defense, Losses, likeliest
from emr_training.training.averaging import Average
from emr_training.training.batches import make_order
from emr_training.training.build import make_defense, make_optimizer, make_penalties
from emr_training.training.costs import penalty_passes
from emr_training.training.images import TrainingImages
from emr_training.training.metrics import EpochMetrics, MetricFiles
from emr_training.training.schedule import learning_rate_factor
from emr_training.training.snapshot import RUN_FILES, STATE, capture, load_state, restore, save_state
from emr_training.training.validation import Validation
from emr_training.training.watch import LossWatch, StopSignal, TrainingDiverged

#: Between the seeds of two processes' random starts.
_STRIDE = 1_000_003


class Loop:
    """One run: made, prepared (from its beginning or from a saved state), run. See `train`."""

    def __init__(
        self,
        config: RunConfig,
        fabric: Fabric,
        model: nn.Module,
        data: Data,
        validation: Data | None,
        classes: int,
        extra: Data | None,
        output: Path | None,
        on_epoch: Callable[[EpochMetrics], None] | None,
        on_step: Callable[[int, int, int], None] | None,
    ) -> None:
        trainer = config.trainer
        self.config, self.fabric, self.model = config, fabric, model
        self.device, self.rank, self.world = fabric.device, fabric.global_rank, fabric.world_size
        self.parts = self.world * trainer.accumulate
        self.classes, self.output = classes, output
        self.on_epoch, self.on_step = on_epoch, on_step
        self.input_shape = tuple(data.x.shape[1:])
        self.meter = Meter(self.device, self.world)

        if trainer.sync_batchnorm and self.world > 1:
            self.model = model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        layout = torch.channels_last if trainer.channels_last and len(self.input_shape) == 3 else None
        if layout is not None:
            model.to(memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(config.optimizer, model)
        self.rates = [config.optimizer.learning_rate for _ in self.optimizer.param_groups]
        self.wrapped, self.fabric_optimizer = fabric.setup(model, self.optimizer)
        self.wrapped.register_forward_pre_hook(self._count)
        self.average = Average(trainer.average, model) if trainer.average.name != "none" else None
        self.result: nn.Module = model if self.average is None else self.average.model
        self.penalties = make_penalties(config, model, self.parts)
        self.given = config.penalties.given()
        self.defense = make_defense(config, tuple(self.penalties.values()), self.parts)

        # Streams of their own: batches come in the same order whether or not the method draws random starts.
        self.order = make_order(config, len(data), 0 if extra is None else len(extra))
        seed, dtype = trainer.seed + _STRIDE * self.rank, next(p.dtype for p in model.parameters())
        self.starts = torch.Generator(self.device).manual_seed(seed)
        self.images = TrainingImages(
            config.data.augmentation, classes, data, extra, self.device, dtype, layout, seed=seed + 1
        )
        self.validation = None
        if validation is not None and len(validation):
            held_out = validation.to(self.device)
            if dtype is torch.float64:
                held_out = Data(held_out.images().double(), held_out.y)
            self.validation = Validation(config, held_out, self.rank, self.world, self._sum)
        self.steps = trainer.epochs * self.order.batches
        self.watch = LossWatch(1 if self.device.type == "cpu" else 16)
        self.files: MetricFiles | None = None

        self.epoch, self.step = 1, 0
        self.sums: dict[str, Tensor] = {}
        self.seen, self.seconds = 0, 0.0
        self.history: list[EpochMetrics] = []
        self.best: EpochMetrics | None = None
        self.worse = 0
        self._saved: int | None = None
        self._epoch_started = time.perf_counter()

    # Beginning and end

    def prepare(self, resume: bool) -> None:
        """Take up the saved state, or clear the way for a new run."""
        if resume:
            assert self.output is not None
            restore(self, load_state(self.output))
            self._saved = self.step
        if self.output is None or self.rank:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        if not resume:
            # What an earlier run left here would be taken for this one's.
            for name in RUN_FILES:
                (self.output / name).unlink(missing_ok=True)
        text = dump_config(self.config)
        write_atomically(self.output / "config.yaml", lambda file: file.write(text.encode()))
        self.files = MetricFiles(self.output, self.history, tensorboard=self.config.trainer.tensorboard)

    def close(self) -> None:
        """Finish what is being written."""
        if self.files is not None:
            self.files.close()

    def run(self, stop: StopSignal) -> str | None:
        """Train to the end; returns what ended it before that, if anything did."""
        patience = self.config.trainer.patience
        while self.epoch <= self.config.trainer.epochs:
            if patience is not None and self.worse >= patience:
                return "patience"
            if not self._run_epoch(stop):
                return stop.name or "signal"
            self._finish_epoch()
        return None

    # Epochs

    def _run_epoch(self, stop: StopSignal) -> bool:
        """The steps that are left of the epoch; False if a signal came."""
        self._epoch_started = time.perf_counter()
        defense = self.defense.at_epoch(self.epoch)
        self.wrapped.train()
        for index in self.order:
            self._train_on(defense, index)
            if self._agreed(stop.name is not None):
                self._look()
                self.save()
                return False
            every = self.config.trainer.checkpoint_steps
            if every is not None and self.step % every == 0 and self.step % self.order.batches:
                self._look()
                self.save()
        self._look()
        return True

    def _finish_epoch(self) -> None:
        if self.average is not None:
            plain = self.images.unchanged(max(self.config.trainer.batch_size, 256))
            self.average.after_epoch(self.epoch, plain)
        clean, robust = self._validate()
        totals = {name: float(self._sum(value)) for name, value in sorted(self.sums.items())}
        seen = float(self._sum(torch.tensor(float(self.seen), device=self.device)))
        correct = totals.pop("\0correct")
        training_seconds = max(self.epoch_seconds(), 1e-9)
        metrics = EpochMetrics(
            epoch=self.epoch,
            step=self.step,
            losses={name: totals[name] / seen for name in self.sums if name in totals},
            train_accuracy=correct / seen,
            validation_accuracy=clean,
            validation_robust_accuracy=robust,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            strengths={name: self.given[name].at_epoch(self.epoch) for name in self.penalties},
            seconds=training_seconds,
            images_per_second=seen / training_seconds,
            costs=self.meter.read(),
        )
        self.history.append(metrics)
        self.epoch += 1
        self.sums, self.seen, self.seconds = {}, 0, 0.0
        better = metrics.is_better_than(self.best, self.config.evaluation.select)
        if better:
            self.best, self.worse = metrics, 0
        elif clean is not None:
            self.worse += 1
        if self.output is not None:
            if not self.rank:
                if better:
                    self._save_model("best.pt", metrics)
                if self.epoch > self.config.trainer.epochs or self._ends_early():
                    self._save_model("last.pt", metrics)
            self.save()
        if self.files is not None:
            self.files.epoch(self.history)
        if self.on_epoch is not None and not self.rank:
            self.on_epoch(metrics)

    def _ends_early(self) -> bool:
        patience = self.config.trainer.patience
        return patience is not None and self.worse >= patience

    def _validate(self) -> tuple[float | None, float | None]:
        due = self.epoch % self.config.evaluation.every == 0 or self.epoch == self.config.trainer.epochs
        if self.validation is None or not due:
            return None, None
        self.meter.tally.add(len(self.validation) / self.world, 0)
        return self.validation.measure(self.result)

    # Steps

    def _train_on(self, defense: Defense, index: Tensor) -> None:
        """One update from the whole batch `index`, of which this process runs its share."""
        trainer = self.config.trainer
        if len(index) < self.parts:
            # A short batch that leaves a process without an image.
            self.step += 1
            return
        self._set_rate_and_strengths(len(index))
        mine = index.tensor_split(self.world)[self.rank]
        terms: dict[str, Tensor] = {}
        self.optimizer.zero_grad()
        for part, chunk in enumerate(mine.tensor_split(trainer.accumulate)):
            # Means over parts of different sizes make up the mean of the batch; 1 where all are alike.
            weight = len(chunk) * self.parts / len(index)
            last = part == trainer.accumulate - 1
            alone = self.world == 1 or last
            with nullcontext() if alone else self.fabric.no_backward_sync(self.wrapped):
                losses = self._losses(defense, chunk, index)
                self.fabric.backward(losses.total * (weight / trainer.accumulate))
            for name, term in losses.terms.items():
                value = term.detach()
                terms[name] = terms.get(name, 0) + value * (weight / trainer.accumulate)
                self.sums[name] = self.sums.get(name, 0) + value.double() * len(chunk)
        bad = self.watch.add(self.epoch, self.step + 1, index, terms)
        if self._agreed(bad is not None):
            self._diverged(bad)
        if self.config.optimizer.clip_norm is not None:
            self.fabric.clip_gradients(self.wrapped, self.fabric_optimizer, max_norm=self.config.optimizer.clip_norm)
        self.fabric_optimizer.step()
        if self.average is not None:
            self.average.after_step(self.epoch)
        self.step += 1
        self.meter.images += len(index)
        self._report(terms, len(index))

    def _losses(self, defense: Defense, chunk: Tensor, index: Tensor) -> Losses:
        x, y = self.images.batch(chunk)
        try:
            with self.fabric.autocast():
                losses = defense(self.wrapped, x, y, generator=self.starts)
        except ValueError:
            # Attacks refuse a model whose logits are NaN.
            if self._finite():
                raise
            self._diverged(
                f"training diverged in epoch {self.epoch} before step {self.step + 1}: the weights are nan or infinite "
                f"when the training images {index.tolist()} come"
            )
        for name, penalty in self.penalties.items():
            if penalty.strength:
                forwards, backwards = penalty_passes(self.given[name])
                self.meter.tally.add(forwards * len(chunk), backwards * len(chunk))
        right = (losses.logits.detach().argmax(1) == likeliest(y)).sum().double()
        self.sums["\0correct"] = self.sums.get("\0correct", 0) + right
        self.seen += len(chunk)
        return losses

    def _set_rate_and_strengths(self, count: int) -> None:
        factor = learning_rate_factor(self.config.schedule, self.step, self.order.batches, self.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        for name, penalty in self.penalties.items():
            section = self.given[name]
            penalty.strength = section.at_epoch(self.epoch)
            if self.parts > 1 and getattr(section, "reduction", None) == "paper":
                # Split batches divide by the nominal batch; a short one is to be divided by its own size.
                penalty.strength *= self.config.trainer.batch_size / count

    def _report(self, terms: dict[str, Tensor], images: int) -> None:
        if self.rank:
            return
        if self.files is not None and self.files.wants_steps and self.step % self.config.trainer.log_steps == 0:
            values = {f"loss/{name}": float(term) for name, term in terms.items()}
            self.files.step(self.step, {**values, "learning_rate": float(self.optimizer.param_groups[0]["lr"])})
        if self.on_step is not None:
            self.on_step(self.step, self.steps, images)

    def _count(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.meter.tally.add(len(arguments[0]), len(arguments[0]))

    # Faults

    def _look(self) -> None:
        bad = self.watch.look()
        if self._agreed(bad is not None):
            self._diverged(bad)
        if not self._finite():
            self._diverged(
                f"training diverged in epoch {self.epoch}: the weights are nan or infinite after step {self.step}"
            )

    def _finite(self) -> bool:
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.model.parameters()]))
        return bool(norms.isfinite().all())

    def _diverged(self, what: str | None) -> None:
        what = what or f"training diverged in another process by step {self.step + 1}"
        if self.output is None:
            good = "no checkpoint, as there is no output folder"
        elif self._saved is None:
            good = "no checkpoint was written before"
        else:
            good = f"the last good checkpoint is {self.output / STATE}, after step {self._saved}"
        raise TrainingDiverged(f"{what}; {good}; try a smaller optimizer.learning_rate or penalty strength")

    def _agreed(self, mine: bool) -> bool:
        """Whether any process says so."""
        if self.world == 1:
            return mine
        return bool(self._sum(torch.tensor(float(mine), device=self.device)) > 0)

    def _sum(self, value: Tensor) -> Tensor:
        if self.world == 1:
            return value
        return self.fabric.all_reduce(value, reduce_op="sum")  # type: ignore[return-value]

    # What is kept

    def epoch_seconds(self) -> float:
        return self.seconds + time.perf_counter() - self._epoch_started

    def _save_model(self, name: str, metrics: EpochMetrics) -> None:
        assert self.output is not None
        save_checkpoint(
            self.output / name,
            self.result,
            self.config,
            input_shape=self.input_shape,
            classes=self.classes,
            metrics=metrics.as_dict(),
        )

    def save(self) -> None:
        """Write state.pt, from which the run goes on at the next step; all processes take part."""
        if self.output is None:
            return
        state = capture(self)
        if not self.rank:
            save_state(self.output, state)
        self._saved = self.step
