"""Logits and input gradients of a model that is lent to an attack, by the fastest exact way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from emr_kernels.linearize import LinearizedPoint, UnsupportedModelError
from emr_kernels.linearize.cache import find_program
from emr_kernels.linearize.program import Program
from emr_kernels.linearize.sharing import hooked
from emr_kernels.linearize.wrappers import unwrap
from emr_training.attacks.incremental import Incremental
from emr_training.guard import logits_of

Model = Callable[[Tensor], Tensor]
Engine = Literal["auto", "autograd"]
Precision = Literal["ambient", "float32", "bfloat16", "float16"]
ENGINES = ("auto", "autograd")
PRECISIONS = ("ambient", "float32", "bfloat16", "float16")
_NO_GRADIENT = (
    "the model's logits have no gradient in x (it is detached, or made by an operator without one); "
    "expected a differentiable model; Square attacks one that is not"
)


class At(Protocol):
    """A classifier linearized at one batch: its logits [N, C], and vjp(seed [N, C]) shaped like the batch."""

    logits: Tensor

    def vjp(self, seed: Tensor) -> Tensor: ...


class _ByAutograd:
    """`At` from a forward that autograd has recorded."""

    def __init__(self, point: Tensor, logits: Tensor) -> None:
        self._point, self._logits = point, logits
        self.logits = logits.detach()

    def vjp(self, seed: Tensor) -> Tensor:
        seed = seed.to(self._logits.dtype)
        (found,) = torch.autograd.grad(self._logits, self._point, seed, retain_graph=True, allow_unused=True)
        if found is None:  # though they have a graph: that of the model's parameters
            raise ValueError(_NO_GRADIENT)
        return found


class _FirstRow:
    """`At` for one image out of a batch in which it stands twice."""

    def __init__(self, twice: At) -> None:
        self._twice = twice
        self.logits = twice.logits[:1]

    def vjp(self, seed: Tensor) -> Tensor:
        return self._twice.vjp(torch.cat([seed, seed]))[:1]


class Classifier:
    """A model in the mode that the attack asks for.

    With engine "auto" the model runs as a linearized program (forward, then one backward pass over sign bits, no
    autograd graph) where it can be one exactly; otherwise, and with "autograd", through autograd. A plain callable is
    differentiated by autograd, too. With `freeze` what follows from parameters and buffers alone is computed once, so
    they have to stay as they are.

    Attributes:
        forwards, backwards: images that were run so far.
        nans: how many times an image was judged by logits with NaN.
        checked: whether logits have been looked at: their shape, NaN, and the labels' range.
        reason: why autograd is used; None with the engine.
    """

    def __init__(
        self,
        model: Model,
        engine: Engine = "auto",
        precision: Precision = "ambient",
        *,
        evaluation: bool = True,
        freeze: bool = True,
    ):
        self.model = model
        self.forwards = 0
        self.backwards = 0
        self.nans: int | Tensor = 0  # on a GPU a tensor, so that nobody waits for it
        self.checked = False
        self.reason: str | None = None
        self._precision = precision
        self._freeze = freeze
        self._programs: dict[bool, Program] = {}
        if engine == "autograd":
            self.reason = "the attack asks for it"
        elif not isinstance(model, nn.Module):
            self.reason = "the model is a plain callable"
        elif not evaluation:
            self.reason = "the model is attacked in training mode"
        elif hooked(unwrap(model)):
            self.reason = "the model has hooks"

    def is_plain(self, device: torch.device) -> bool:
        """Whether a search sees the numbers of the model itself, called without autocast."""
        return self.reason is not None and not self.autocasts(device)

    def autocasts(self, device: torch.device) -> bool:
        """Whether the search runs in another precision than the model's own."""
        if self._precision == "ambient":
            return torch.is_autocast_enabled(device.type)
        return self._precision != "float32"

    @contextmanager
    def _search_precision(self, device: torch.device) -> Iterator[None]:
        if self._precision == "ambient":
            yield
            return
        low = self._precision != "float32"
        with torch.autocast(device.type, dtype=getattr(torch, self._precision) if low else None, enabled=low):
            yield

    def unfrozen(self) -> Classifier:
        """The same, for parameters that may change between calls, its logits taken for checked."""
        copied = Classifier(self.model, "auto", self._precision, freeze=False)
        copied.reason, copied.checked = self.reason, True
        return copied

    def program(self, x: Tensor) -> Program | None:
        """The linearized model for batches like x (of two or more images)."""
        if self.reason is not None:
            return None
        autocast = self.autocasts(x.device)
        if autocast not in self._programs:
            assert isinstance(self.model, nn.Module)
            try:
                program = find_program(unwrap(self.model), x)
            except (UnsupportedModelError, TypeError, ValueError) as error:
                # A model that fails on x fails again below, in its own words.
                self.reason = str(error)
                return None
            self._programs[autocast] = program.frozen() if self._freeze else program
        program = self._programs[autocast]
        # A program for one batch size would be exported again whenever an image drops out.
        return program if program.graph.serves(x.shape[0]) else None

    def incremental(self, x: Tensor) -> Incremental | None:
        """The model for changes to windows of batches like x; None where it has no such form, or none that pays.

        Its logits are not the model's own to the last bit: a success is to be confirmed.
        """
        if x.device.type != "cpu" or x.dim() != 4 or x.shape[0] < 2 or self.autocasts(x.device):
            return None
        program = self.program(x)
        if program is None:
            return None
        with torch.no_grad():
            return Incremental.of(program, unwrap(self.model), x.shape[0])  # type: ignore[arg-type]

    def linearized(self, x: Tensor) -> At:
        """Logits at x [N, ...], and vjps there.

        Raises:
            ValueError: if the logits do not depend on x in a way that autograd can follow.
        """
        self.forwards += x.shape[0]
        with self._search_precision(x.device):
            if x.shape[0] == 1 and self.reason is None:
                # One export serves all batches but those of a single image.
                twice = torch.cat([x, x])
                program = self.program(twice)
                if program is not None:
                    return _FirstRow(LinearizedPoint.at(program, unwrap(self.model), twice))  # type: ignore[arg-type]
            else:
                program = self.program(x)
                if program is not None:
                    return LinearizedPoint.at(program, unwrap(self.model), x)  # type: ignore[arg-type]
            point = x.detach().requires_grad_()
            with torch.enable_grad():
                logits = logits_of(self.model, point)
        if not isinstance(logits, Tensor):
            kind = type(logits).__name__
            raise ValueError(f"the model's output is {kind}; expected logits [{x.shape[0]}, C] with C >= 2 classes")
        if not logits.requires_grad:
            raise ValueError(_NO_GRADIENT)
        return _ByAutograd(point, logits)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [N, C] at x [N, ...], in the search's precision, without a gradient.

        They come from the linearized program once it has been asked for: its forward is the faster one, too.
        """
        self.forwards += x.shape[0]
        # Not inference mode: a model that caches a tensor would be left with one that autograd refuses.
        with torch.no_grad(), self._search_precision(x.device):
            program = self.program(x) if self._programs and x.shape[0] > 1 else None
            if program is not None:
                return LinearizedPoint.at(program, unwrap(self.model), x).logits  # type: ignore[arg-type]
            return logits_of(self.model, x)

    def plain_logits(self, x: Tensor) -> Tensor:
        """Logits [N, C] of the model itself, without autocast: what a success is judged by."""
        self.forwards += x.shape[0]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return logits_of(self.model, x)
