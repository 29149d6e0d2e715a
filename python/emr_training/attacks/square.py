"""Square: random search that needs nothing but the model's scores."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from emr_training.attacks.base import BoundedAttack, check_choice
from emr_training.attacks.classifier import Model
from emr_training.attacks.incremental import Incremental
from emr_training.attacks.losses import LOSSES, Loss
from emr_training.attacks.noise import Noise
from emr_training.attacks.problem import Problem
from emr_training.attacks.windows import Bumps, Corners, Proposals
from emr_training.errors import check_count, check_number

#: After these iterations the window's part of the image is halved.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
#: Random numbers are drawn for so many iterations at once.
_BLOCK = 50
_STREAMS_OF_A_RESTART = 2**32
#: From so many queries on it pays to look at how the model is built.
_MANY = 200


class SquareResult(NamedTuple):
    """Adversarial examples [N, ...] (the images themselves without success), successes [N], queries spent [N]."""

    x_adv: Tensor
    found: Tensor
    queries: Tensor


@dataclass(frozen=True)
class Square(BoundedAttack):
    """Random search by windows of shrinking size; Andriushchenko et al. 2020, in AutoAttack's version.

    Each iteration changes one window of each image and keeps the change if the loss rises. Every image has windows of
    its own, so that its result does not depend on the batch (AutoAttack's code draws one window for all). A proposal
    that changes nothing is not put to the model, as the answer is known. On the CPU the first layers of a convolutional
    network are computed only where a small window can be seen.

    queries: iterations, after one query for the start.
    p: the part of the image that the first windows cover; halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and
        8000 iterations.
    rescale: stretch that schedule from 10,000 iterations to `queries`, as the original does (with p 0.05 under Linf
        and 0.1 under L2); AutoAttack does not.
    loss: "cw" (the margin) or "ce".
    """

    queries: int = 5000
    p: float = 0.8
    rescale: bool = False
    restarts: int = 1
    loss: Literal["cw", "ce"] = "cw"

    targetable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("queries", self.queries)
        check_count("restarts", self.restarts)
        check_number("p", self.p, low=0.0, high=1.0)
        check_choice("loss", self.loss, ("cw", "ce"))

    def part(self, iteration: int) -> float:
        """The part of the image that a window covers, iterations counted from 0."""
        place = int(iteration / self.queries * 10_000) if self.rescale else iteration
        return self.p / 2 ** bisect_left(HALVINGS, place)

    def check_shape(self, x: Tensor) -> None:
        """See `Attack`."""
        if x.dim() > 4:
            expected = "images [N, C, H, W], [N, H, W] or vectors [N, D]"
            raise ValueError(f"x has shape {list(x.shape)}; expected {expected} for Square")

    def search(self, problem: Problem) -> Tensor:
        """See `Attack`."""
        return self.run(problem).x_adv

    def with_queries(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        target: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The call, and how many queries were spent on each image, [N] (int64)."""
        counted = _Counted(**{entry.name: getattr(self, entry.name) for entry in fields(Square)})
        x_adv = counted(model, x, y, target=target, generator=generator)
        return x_adv, counted.tally[0] if counted.tally else torch.zeros_like(y)

    def run(self, problem: Problem) -> SquareResult:
        """The search, with its counts."""
        noise = problem.noise()
        clean = problem.fooled(problem.x, problem.logits(problem.x))
        found = SquareResult(problem.x.clone(), clean, torch.zeros_like(problem.y))
        for restart in range(self.restarts):
            rows = (~found.found).nonzero().squeeze(1)
            if rows.numel() == 0:
                break
            self._walk(problem.subset(rows), noise.subset(rows), restart * _STREAMS_OF_A_RESTART, rows, found)
        return found

    def _walk(self, problem: Problem, noise: Noise, stream: int, rows: Tensor, found: SquareResult) -> None:
        """One restart on the images `rows`, whose successes and queries are noted in `found`."""
        shape = problem.x.shape
        images = problem.x.reshape(shape[0], *(1,) * max(4 - problem.x.dim(), 0), *shape[1:])
        kind = Corners if self.norm == "Linf" else Bumps
        proposals: Proposals = kind(self.ball, images, noise, stream)
        asked = _Asked(problem, proposals, LOSSES[self.loss], self.queries >= _MANY)
        for iteration in range(self.queries + 1):
            if iteration == 0:
                fooled, changed = asked.start()
            else:
                place = (iteration - 1) % _BLOCK
                if place == 0:
                    block = 1 + (iteration - 1) // _BLOCK
                    bits = noise.bits(stream + block, _BLOCK * proposals.width).view(-1, _BLOCK, proposals.width)
                fooled, changed = asked.proposal(bits[:, place], proposals.side(self.part(iteration - 1)))
            found.queries[rows] += changed
            hit = fooled.nonzero().squeeze(1)
            if hit.numel():
                found.found[rows[hit]] = True
                found.x_adv[rows[hit]] = proposals.point[hit].view(-1, *shape[1:])
                stays = (~fooled).nonzero().squeeze(1)
                if stays.numel() == 0:
                    return
                rows, noise = rows[stays], noise.subset(stays)
                asked.keep(stays)
                if iteration > 0:
                    bits = bits[stays]


class _Asked:
    """What the model says of the points and proposals of n images: their greatest loss so far, which to keep.

    Where the model begins with layers that see neighbourhoods alone, and windows have become small, only what a window
    touches is computed.
    """

    def __init__(self, problem: Problem, proposals: Proposals, loss: Loss, look_inside: bool) -> None:
        self.problem, self.proposals, self._loss = problem, proposals, loss
        self.value = torch.full((len(problem),), -torch.inf, dtype=problem.x.dtype, device=problem.x.device)
        self._inside: Incremental | None = None
        self._look_inside = look_inside and isinstance(proposals, Corners)
        self._holds = False

    def start(self) -> tuple[Tensor, Tensor]:
        """Put the starting points to the model: which rows succeed [n], and which were asked [n]."""
        every = torch.ones_like(self.problem.y, dtype=torch.bool)
        _, fooled = self._answer(self.proposals.point, every)
        return fooled, every

    def proposal(self, bits: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Propose, put to the model what differs, and settle; see `start`."""
        if self._look_inside and not self._holds:
            self._hold(side)
        candidate, changed = self.proposals.propose(bits, side)
        better, fooled = self._answer(candidate, changed)
        self.proposals.settle(better)
        if self._inside is not None and self._holds and bool(changed.any()):
            self._inside.settle(better[changed])
        return fooled, changed

    def keep(self, stays: Tensor) -> None:
        """Drop all images but these (indices)."""
        self.problem, self.value = self.problem.subset(stays), self.value[stays]
        self.proposals.keep(stays)
        if self._inside is not None and self._holds:
            self._inside.keep(stays)

    def _hold(self, side: int) -> None:
        """Look inside the model as soon as a window of this size is small enough."""
        if self._inside is None:
            self._inside = self.problem.classifier.incremental(self.problem.x)
            self._look_inside = self._inside is not None
        if self._inside is not None and self._inside.pays(side, side):
            self._inside.begin(self.proposals.point)
            self.problem.classifier.forwards += len(self.problem)
            self._holds = True

    def _answer(self, candidate: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
        rows = changed.nonzero().squeeze(1)
        better, fooled = torch.zeros_like(changed), torch.zeros_like(changed)
        if rows.numel() == 0:
            return better, fooled
        problem = self.problem
        if self._holds:
            logits, y = self._inside_logits(rows), problem.y[rows]
            target = None if problem.target is None else problem.target[rows]
            won = problem.judged(logits, rows).nonzero().squeeze(1)
            hit = rows[won]
            if hit.numel():
                fooled[hit] = problem.subset(hit).fooled(self._laid_out(candidate[hit]), logits[won])
        else:
            if rows.numel() < len(problem):
                problem, candidate = problem.subset(rows), candidate[rows]
            y, target = problem.y, problem.target
            points = self._laid_out(candidate)
            logits = problem.logits(points)
            fooled[rows] = problem.fooled(points, logits)
        value, _ = self._loss(logits, y, target)
        value = value.to(self.value.dtype).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        better[rows] = (value > self.value[rows]) | fooled[rows]
        self.value[rows] = torch.maximum(self.value[rows], value)
        return better, fooled

    def _laid_out(self, candidate: Tensor) -> Tensor:
        """Candidates [m, C, H, W] in the shape and memory format of the images."""
        x = self.problem.x
        point = candidate.view(-1, *x.shape[1:])
        if x.dim() == 4 and not x.is_contiguous():
            return point.contiguous(memory_format=torch.channels_last)
        return point

    def _inside_logits(self, rows: Tensor) -> Tensor:
        assert self._inside is not None and isinstance(self.proposals, Corners)
        self.problem.classifier.forwards += len(rows)
        with torch.no_grad():
            return self._inside.change(rows, *self.proposals.window(rows))


@dataclass(frozen=True)
class _Counted(Square):
    """Square that keeps the queries of its calls."""

    tally: list[Tensor] = field(default_factory=list)

    def search(self, problem: Problem) -> Tensor:
        found = self.run(problem)
        self.tally.append(found.queries)
        return found.x_adv
