"""AutoAttack: an ensemble of attacks without parameters to choose, and the robust accuracy that it leaves."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emr_training.attacks.balls import Ball, Norm, check_norm
from emr_training.attacks.base import Attack, check_choice
from emr_training.attacks.classifier import Classifier, Model
from emr_training.attacks.evaluation import Evaluation
from emr_training.attacks.problem import Problem
from emr_training.attacks.report import Report
from emr_training.attacks.result import AutoAttackResult, summarize
from emr_training.attacks.state import Saver, State, fingerprint
from emr_training.attacks.suite import ORDERS, VERSIONS, Order, Version, suite
from emr_training.errors import check_count, check_images, check_number
from emr_training.guard import bare, left_as_found


@dataclass(frozen=True)
class AutoAttack(Attack):
    """The ensemble of Croce and Hein 2020; an image is robust if every attack fails on it.

    `run(model, x, y)` evaluates a set of any size; `attack(model, x, y)` is an attack like the others, which returns
    the adversarial examples alone; `AutoAttack(model, norm=..., eps=...).run_standard_evaluation(x, y)` is what code
    written for the original calls.

    Every attack runs on the images that survived the ones before, gathered anew into full batches. What it takes for a
    success is classified again by the model itself, without autocast, and counts only if it is misclassified there.
    The random numbers of an image depend on the seed and its place in x alone.

    seed: None: another one at each construction.
    model: for the methods that are not given one.
    norm, eps: the ball, in units of the [0, 1] pixel range.
    version: "standard": APGD-CE, APGD-T, FAB-T, Square. "plus": more restarts, and APGD-DLR and FAB, too. "rand", for
        models that are random: APGD-CE and APGD-DLR on gradients averaged over 20 passes. "custom": `attacks_to_run`.
    order: "standard" is the original order. "yield": first what breaks most in its time: ten steps of APGD-CE (beside
        the version's attacks), APGD-T, and at last Square and FAB. The final robust accuracy is that of the same worst
        case; what each single attack is credited with depends on the order.
    attacks_to_run: for the version "custom": names ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"), or a
        mapping of names of your own to attacks within eps, which run in its order, with the seed, bn_mode, precision
        and engine of the ensemble.
    batch_size: images at a time.
    verbose: print the original's lines, and on a terminal a progress bar with the running robust accuracy.
    log_path: a file to which the lines are appended.
    device: where batches are attacked; None: where the model's parameters are, else where x is.
    """

    model: Model | None = field(default=None, repr=False)
    norm: Norm = "Linf"
    eps: float = 8 / 255
    _: KW_ONLY
    version: Version = "standard"
    order: Order = "standard"
    attacks_to_run: Sequence[str] | Mapping[str, Attack] = ()
    batch_size: int = 250
    verbose: bool = True
    log_path: str | Path | None = None
    device: str | torch.device | None = None

    def __post_init__(self) -> None:
        if self.seed is None:  # as the original has it; drawn here, so that the result can tell it
            object.__setattr__(self, "seed", secrets.randbits(31))
        super().__post_init__()
        check_choice("version", self.version, VERSIONS)
        check_choice("order", self.order, ORDERS)
        check_count("batch_size", self.batch_size)
        if self.model is not None and not callable(self.model):
            kind = type(self.model).__name__
            raise TypeError(f"model is of type {kind}; expected a callable that returns logits [N, C]")
        check_number("eps", self.eps, low=0.0)
        check_norm(self.norm)
        self.attacks()

    @property
    def ball(self) -> Ball:
        """Where the attacks may go."""
        return Ball(self.norm, self.eps)

    def attacks(self) -> dict[str, Attack]:
        """The attacks by name, in the order in which they run."""
        shared: dict[str, Any] = {
            "seed": self.seed,
            "bn_mode": self.bn_mode,
            "precision": self.precision,
            "engine": self.engine,
        }
        return suite(self.norm, self.eps, self.version, self.order, self.attacks_to_run, **shared)

    def verify(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return x_adv; raise RuntimeError unless it is in the ball around x and in [0, 1]."""
        return self.ball.check(x_adv, x)

    def check_shape(self, x: Tensor) -> None:
        """See `Attack`."""
        for attack in self.attacks().values():
            attack.check_shape(x)

    def search(self, problem: Problem) -> Tensor:
        """See `Attack`."""
        seed = int(torch.randint(2**62, (1,), generator=problem.generator, device=problem.generator.device))
        evaluation = self._evaluation(problem.classifier, problem.x, problem.y, Report(False), Saver(None, {}), seed)
        state = evaluation.begin()
        evaluation.run(state, check=False)
        return state.x_adv

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        batch_size: int | None = None,
        state_path: str | Path | None = None,
    ) -> tuple[Tensor, AutoAttackResult]:
        """Adversarial examples, like x, and what the evaluation says; the model is as before afterwards.

        Args:
            model: returns logits [N, C] and holds its input normalisation inside: an nn.Module, or any callable.
            x: images [N, ...] in [0, 1], N > 0; batches are moved to `device`.
            y: labels [N], int64.
            batch_size: images at a time; None: the attack's own.
            state_path: a file in which the state is kept, so that an evaluation that was cut off goes on where it was
                (and one that was finished returns at once).

        Returns:
            the adversarial examples (the images themselves where robust or misclassified from the beginning), and the
            result.

        Raises:
            TypeError, ValueError: for an x outside [0, 1], labels out of range, a model that returns no logits [N, C]
                or NaN, or that has no gradient; a state of other data, another model or other settings.

        Warns:
            EvaluationWarning: if the model is random, returns probabilities, takes gradients in its forward pass or
                has gradients of zero, if its logits become NaN near the images, or if Square breaks what attacks by
                gradient did not.
        """
        check_images(x, y)
        if not callable(model):
            raise TypeError(f"model is of type {type(model).__name__}; expected a callable that returns logits [N, C]")
        if x.numel() == 0:
            raise ValueError(f"x has shape {list(x.shape)}; expected at least one image")
        self.check_shape(x)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        if isinstance(model, nn.Module):
            model = bare(model)
        attack = self if batch_size is None else replace(self, batch_size=batch_size)
        return attack._run(model, x, y, None if state_path is None else Path(state_path))

    def _run(self, model: Model, x: Tensor, y: Tensor, path: Path | None) -> tuple[Tensor, AutoAttackResult]:
        device = self._device_of(model, x)
        evaluation = self.bn_mode == "eval"
        settings = {"norm": self.norm, "eps": self.eps, "version": self.version, "order": self.order, "seed": self.seed}
        with left_as_found(model, device, evaluation=evaluation), Report(self.verbose, self.log_path) as report:
            # Tensors made in inference mode cannot take part in autograd; copies made outside of it can.
            x, y = x.detach().clone(), y.clone()
            names = [f"{name}: {attack!r}" for name, attack in self.attacks().items()]
            belongs_to = {} if path is None else fingerprint(model, x, y, [str(settings), *names])
            restored = State.load(path, belongs_to, x) if path is not None and path.exists() else None
            classifier = Classifier(model, self.engine, self.precision, evaluation=evaluation)
            saver = Saver(path, belongs_to)
            run = self._evaluation(classifier, x, y, report, saver, self.seed, device)
            report.line(f"using {self.version} version including {', '.join(self.attacks())}.")
            if restored is None:
                state = run.begin()
            else:
                run.recognise(restored)
                state = restored
            clean = summarize(state, settings).clean_accuracy
            report.line(f"initial accuracy: {clean:.2%}")
            if restored is not None:
                robust = float(state.robust.double().mean())
                report.line(f"restored from {path}: robust accuracy {robust:.2%} so far")
            run.run(state, check=True)
            self.verify(state.x_adv, x)
            result = summarize(state, settings)
            far = float(self.ball.distance(state.x_adv, x).max())
            low, high = (float(bound) for bound in torch.aminmax(state.x_adv))
            report.line(
                f"max {self.norm} perturbation: {far:.5f}, nan in tensor: {int(state.x_adv.isnan().sum())}, "
                f"max: {high:.5f}, min: {low:.5f}"
            )
            report.line(f"robust accuracy: {result.robust_accuracy:.2%}")
        return state.x_adv, result

    def _evaluation(
        self,
        classifier: Classifier,
        x: Tensor,
        y: Tensor,
        report: Report,
        saver: Saver,
        seed: int,
        device: torch.device | None = None,
    ) -> Evaluation:
        return Evaluation(
            self.attacks(),
            self.ball,
            classifier,
            x,
            y,
            device=device or x.device,
            batch_size=self.batch_size,
            seed=seed,
            report=report,
            saver=saver,
        )

    def _device_of(self, model: Model, x: Tensor) -> torch.device:
        if self.device is not None:
            device = torch.device(self.device)
            if device.type == "cuda" and not torch.cuda.is_available():
                raise ValueError(f"device is {str(device)!r}; expected cpu, as torch sees no GPU here")
            return device
        first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        return x.device if first is None else first.device

    def _own_model(self) -> Model:
        if self.model is None:
            raise ValueError("model is None; expected AutoAttack(model, ...), or run(model, x, y)")
        return self.model

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`run` on the model given to the constructor, in the original's words.

        Returns:
            the adversarial examples, with `return_labels` also the classes that the model sees in them, [N].
        """
        x_adv, result = self.run(self._own_model(), x_orig, y_orig, batch_size=bs, state_path=state_path)
        return (x_adv, result.predicted.to(y_orig.device)) if return_labels else x_adv

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Tensor] | dict[str, tuple[Tensor, Tensor]]:
        """Each attack on all images, whatever the others break; the adversarial examples by the attack's name."""
        found = {}
        report = Report(self.verbose, self.log_path)
        for name, attack in self.attacks().items():
            alone = replace(self, version="custom", attacks_to_run={name: attack}, verbose=False, log_path=None)
            x_adv, result = alone.run(self._own_model(), x_orig, y_orig, batch_size=bs)
            found[name] = (x_adv, result.predicted.to(y_orig.device))
            accuracy = f"{result.robust_accuracy:.2%}"
            report.line(f"robust accuracy by {name.upper()} \t {accuracy} \t (time attack: {result.seconds:.1f} s)")
        return found if return_labels else {name: x_adv for name, (x_adv, _) in found.items()}
