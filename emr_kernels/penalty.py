"""`EffectiveWeightPenalty`: the regularizer alone, to add to any loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from emr_kernels.checks import check_input, check_labels, check_model
from emr_kernels.distributed import SynchronisationGuard
from emr_kernels.engine import Engine, find_engine, warn_fallback
from emr_kernels.graphed import GraphCache
from emr_kernels.linearize.cache import forget
from emr_kernels.linearize.wrappers import unwrap
from emr_kernels.options import PenaltyOptions


@dataclass(frozen=True)
class PenaltyTerms:
    """What the last call computed, detached.

    Attributes:
        penalty: the reduced penalty, 0-d (`[N]` for reduction "none"), without the strength.
        effective_weight_norms: ‖w‖₂ of each sample, `[N]`, by layer; NaN for samples outside the subset, empty
            for a call that `every` skipped.
    """

    penalty: torch.Tensor
    effective_weight_norms: dict[str, torch.Tensor]


class EffectiveWeightPenalty(nn.Module):
    r"""The squared norm of the effective weight, exact, with its exact parameter gradient.

    With f the evaluation-mode classifier and p a class mix held constant, the effective weight of a sample is
    w_p(x) = ∂(Σ_c p_c f_c(x))/∂x, and r_i = ‖w_p(x_i)‖₂² (Liu & Chan, "Boosting Adversarial Robustness From The
    Perspective of Effective Margin Regularization", BMVC 2022; formula as in the authors' code). The result is

        "paper"   (1/B) · mean_i r_i, B = `batch_size` or the batch's own N: the released code's reduction
        "mean"    mean_i r_i          "sum"   Σ_i r_i          "none"   r, `[N]`

    No double backward: two forward-like and two backward-like passes over the exported model, three where it has
    smooth activations. Models that cannot be exported exactly fall back to double backward, with one warning.

    Args:
        model: classifier `[N, ...]` -> logits `[N, C]`; wrappers (`torch.compile`, DDP, DataParallel, Fabric) are
            looked through. Held without being registered: `state_dict`, `to` and `train` never touch it.
        temperature: T > 0 of the softmax in direction "softmax".
        direction: which effective weight. "softmax": p = softmax(f(x)/T) (the paper). "label": e_y.
            "margin": e_y − e_j, j the strongest rival. "all": Σ_c ‖w_c‖². "random": an unbiased estimate of "all"
            by one random projection. "cross_entropy": the gradient of cross-entropy itself, p − e_y with p = softmax(f)
            not held constant (Ross & Doshi-Velez 2018, whose penalty is half of this in the "paper" reduction).
        reduction: "paper", "mean", "sum" or "none".
        layers: where weights are taken: "input", or names of modules (their input h: w = ∂(Σ_c p_c f_c)/∂h); r_i
            sums over them.
        subset: fraction of the batch, drawn anew at each call, that the penalty is computed on; unbiased.
        every: compute the penalty at every k-th call with gradients only, times k; unbiased over calls.
        center: leave the mean logit's component, which costs no margin, out of the mix: p − mean(p).
        batch_size: nominal N of the "paper" reduction. Under DDP give the global batch, under gradient
            accumulation the effective one (with the loss divided by the number of parts, as usual).
        checks: whether values of x and y are checked: "auto" (always on the CPU, once on a GPU, where it has to
            wait), "always", "never". Shapes and dtypes always are.
        graph: capture the passes in a CUDA graph for each shape of batch, and replay it: one launch instead of
            hundreds. Where that cannot be (on the CPU, for reduction "none") the passes run as without it, and
            `graph_reason` says why.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected, before any work.

    Example:
        >>> penalty = EffectiveWeightPenalty(model, temperature=1.0)
        >>> loss = my_loss(model(x), y) + 0.3 * penalty(x)
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 40.0,
        direction: str = "softmax",
        reduction: str = "paper",
        layers: Sequence[str] = ("input",),
        subset: float = 1.0,
        every: int = 1,
        center: bool = False,
        batch_size: int | None = None,
        checks: str = "auto",
        graph: bool = False,
    ) -> None:
        super().__init__()
        check_model(model)
        self.options = PenaltyOptions(
            temperature,
            direction,
            reduction,
            layers,  # type: ignore[arg-type]  # made a tuple once it is checked
            subset,
            every,
            center,
            batch_size,
            checks,
            graph,
        )
        self._graphs = GraphCache() if graph else None
        # In a tuple, so that nn.Module does not register it.
        self._held = (model,)
        self.calls = 0
        self.engine = "unprepared"
        self.engine_reason: str | None = None
        self.last: PenaltyTerms | None = None
        self._warned = False
        self._checked_devices: set[torch.device] = set()
        self._guard = SynchronisationGuard.of(model)

    @property
    def model(self) -> nn.Module:
        """The classifier, as it was given."""
        return self._held[0]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items())

    def get_extra_state(self) -> dict[str, int]:
        """How many calls `every` has counted."""
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Take up the count where it was saved."""
        self.calls = int(state["calls"])

    def prepare(self, x: torch.Tensor) -> None:
        """Export the model ahead of the first call, from a batch `[N, ...]` as it will come."""
        self.ready(x, None, False)

    @torch.compiler.disable
    def ready(self, x: torch.Tensor, y: torch.Tensor | None, needs_labels: bool) -> Engine:
        """Check the arguments and find the engine, exporting the model if that has not happened yet."""
        model = unwrap(self.model)
        values = self._reads_values(x)
        check_input(model, x, values=values)
        engine = find_engine(model, x, self.options.layers)
        if needs_labels:
            check_labels(y, x, engine.num_classes, values=values)
        if self.options.direction == "margin" and engine.num_classes < 2:
            raise ValueError(f"direction is 'margin', but the model has {engine.num_classes} class; expected two")
        self.engine, self.engine_reason = ("autograd" if engine.program is None else "linearized"), engine.reason
        if engine.program is None and not self._warned:
            self._warned = True
            warn_fallback(engine.reason)
        if values:
            self._checked_devices.add(x.device)
        return engine

    @property
    def graph_reason(self) -> str | None:
        """Why the last call did not replay a CUDA graph; None if it did."""
        return "graph is False" if self._graphs is None else self._graphs.reason

    def refresh(self) -> None:
        """Export the model again at the next call, after a change that its modules and parameters do not show.

        Such as a plain attribute that `forward` branches on, or a forward hook that changes values (hooks run when
        the model is exported, and not again).
        """
        forget(unwrap(self.model))
        self.engine, self.engine_reason = "unprepared", None

    def _reads_values(self, x: object) -> bool:
        """Whether this call reads the data to check it."""
        if self.options.checks != "auto" or not isinstance(x, torch.Tensor):
            return self.options.checks == "always"
        return x.device.type == "cpu" or (x.device.type != "meta" and x.device not in self._checked_devices)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """The reduced penalty at x.

        Args:
            x: `[N, ...]`, on the model's device and in its dtype; the adversarial example in adversarial training.
            y: class indices `[N]`, needed for the directions "label" and "margin".

        Returns:
            0-d (`[N]` for reduction "none"), float32 (float64 for a float64 model). Differentiable once, in the
            parameters and in x.

        Raises:
            TypeError, ValueError: for bad input, before any work.
        """
        engine = self.ready(x, y, self.options.needs_labels)
        return self.compute(engine, x, y)

    @torch.compiler.disable
    def compute(self, engine: Engine, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        """The penalty of arguments that `ready` has checked."""
        options = self.options
        batch = x.shape[0]
        repeats = 1
        if torch.is_grad_enabled():
            self.calls += 1
            repeats = options.every
            if (self.calls - 1) % repeats:
                skipped = torch.zeros(
                    [batch] if options.reduction == "none" else [],
                    dtype=torch.promote_types(x.dtype, torch.float32),
                    device=x.device,
                )
                self.last = PenaltyTerms(skipped, {})
                return skipped
        chosen = None
        count = max(1, round(options.subset * batch))
        if count < batch:
            chosen = torch.randperm(batch, device=x.device)[:count]
            x, y = x[chosen], y[chosen] if y is not None and options.needs_labels else None
        factor = options.factor(count, batch) * repeats
        reduced = options.reduction != "none"
        value, norms = engine.penalty(unwrap(self.model), x, y, options, factor if reduced else None, self._graphs)
        if not reduced:
            value = value * factor
        if chosen is not None:
            if not reduced:
                value = value.new_zeros(batch).index_put((chosen,), value)
            norms = {k: v.new_full((batch,), torch.nan).index_put((chosen,), v) for k, v in norms.items()}
        if self._guard is not None and value.requires_grad:
            value.register_hook(self._guard.check)
        self.last = PenaltyTerms(value.detach(), norms)
        return value

    @torch.compiler.disable
    def with_logits(
        self, engine: Engine, x: torch.Tensor, y: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The logits and the penalty of checked arguments from one forward, both differentiable.

        None where one forward does not serve both: the model is another function in its present mode, is wrapped, or
        has hooks, this call does not compute the penalty of the whole batch, or its passes are a CUDA graph.
        """
        options, model = self.options, self.model
        whole = options.every == 1 and max(1, round(options.subset * x.shape[0])) == x.shape[0]
        captured = self._graphs is not None and x.is_cuda
        if captured or not whole or unwrap(model) is not model or not engine.shares_forward(model, x):
            return None
        self.calls += 1
        logits, value, norms = engine.logits_and_penalty(model, x, y, options, options.factor(x.shape[0], x.shape[0]))
        self.last = PenaltyTerms(value.detach(), norms)
        return logits, value
