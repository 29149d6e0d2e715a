"""PGD-10: emr_training, plain eager PyTorch, torchattacks and foolbox where they are installed, torch.compile.

    python -m benchmarks.attacks --model preactresnet-18 --batch 64
    python -m benchmarks.attacks --model wrn-34-10 --batch 128 --device cuda --precision bf16

The bound is the time of the same products alone: a forward and a data gradient of each at every step, in the faster of
the two memory formats. Every contender starts at the same image without noise, takes the same sign steps and gets
parameters that are frozen; they have to raise the loss by the same, inside the ball, before anything is timed. Times
are medians of interleaved repetitions in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.contest import Contender, Contest, Runner, main
from benchmarks.products import Passes
from benchmarks.setting import Setting
from emr_training.attacks import PGD

EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10
PASSES = Passes(forward=STEPS, data=STEPS, weight=0, images=STEPS)
Logits = Callable[[Tensor], Tensor]


def ascent(logits: Logits, x: Tensor, y: Tensor, setting: Setting) -> Tensor:
    """PGD as it is commonly written."""
    point = x.clone()
    for _ in range(STEPS):
        point = point.detach().requires_grad_()
        with setting.autocast():
            found = logits(point)
        (gradient,) = torch.autograd.grad(F.cross_entropy(found.to(x.dtype), y), point)
        with torch.no_grad():
            point = point + STEP_SIZE * gradient.sign()
            point = torch.min(torch.max(point, x - EPSILON), x + EPSILON).clamp(0, 1)
    return point.detach()


def _rise_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], dict[str, list[Tensor]]]:
    """By how much an attack raises the loss, and how far it leaves the ball.

    Points are not compared, as they differ where a gradient is nearly zero.
    The loss itself would be nearly the same without an attack.
    """

    @torch.no_grad()
    def answer(x_adv: Tensor) -> dict[str, list[Tensor]]:
        rise = F.cross_entropy(model(x_adv), y) - F.cross_entropy(model(x), y)
        beyond = torch.maximum((x_adv - x).abs() - EPSILON, (x_adv - 0.5).abs() - 0.5)
        return {"rise": [rise], "outside": [(beyond - 1e-6).clamp_min(0)]}

    return answer


def _frozen(setting: Setting, layout: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The network without gradients of its parameters, which foolbox would compute, too; images and labels."""
    model, x, y = setting.make(layout)
    return model.requires_grad_(False), x, y


def eager(setting: Setting, layout: str) -> Runner:
    """The loop, parameters frozen."""
    model, x, y = _frozen(setting, layout)
    return Runner(lambda: ascent(model, x, y, setting), _rise_of(model, x, y))


def compiled(setting: Setting, layout: str) -> Runner:
    """The same loop over a model compiled by `torch.compile`."""
    model, x, y = _frozen(setting, layout)
    quick = torch.compile(model)
    return Runner(lambda: ascent(quick, x, y, setting), _rise_of(model, x, y))


def ours(setting: Setting, layout: str, graph: bool = False) -> Runner:
    """emr_training's PGD."""
    model, x, y = setting.make(layout)
    attack = PGD(EPSILON, STEPS, STEP_SIZE, random_start=False, keep="last", graph=graph)

    def step() -> Tensor:
        with setting.autocast():
            return attack(model, x, y)

    return Runner(step, _rise_of(model, x, y))


def torchattacks(setting: Setting, layout: str) -> Runner:
    """torchattacks's PGD as it ships."""
    from torchattacks import PGD as Shipped  # type: ignore[import-not-found]

    model, x, y = _frozen(setting, layout)
    attack = Shipped(model, eps=EPSILON, alpha=STEP_SIZE, steps=STEPS, random_start=False)

    def step() -> Tensor:
        with setting.autocast():
            found: Tensor = attack(x, y)
        return found

    return Runner(step, _rise_of(model, x, y))


def foolbox(setting: Setting, layout: str) -> Runner:
    """foolbox's PGD as it ships; by `run`, as a call asks a further forward for what has succeeded."""
    import foolbox as fb  # type: ignore[import-not-found]

    model, x, y = _frozen(setting, layout)
    lent = fb.PyTorchModel(model, bounds=(0, 1), device=setting.place)
    attack = fb.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=STEPS, random_start=False)

    def step() -> Tensor:
        with setting.autocast():
            found: Tensor = attack.run(lent, x, fb.criteria.Misclassification(y), epsilon=EPSILON)
        return found

    return Runner(step, _rise_of(model, x, y))


def _others(setting: Setting) -> Mapping[str, tuple[Contender, str]]:
    if setting.place.type != "cuda":
        return {}
    graphed: Any = Contender(lambda setting, layout: ours(setting, layout, graph=True), "ours")
    return {f"emr_training, CUDA graph, {layout}": (graphed, layout) for layout in setting.layouts}


CONTEST = Contest(
    name="attacks",
    title="PGD-10",
    ways={
        "eager": Contender(eager),
        "emr_training": Contender(ours, "ours"),
        "torchattacks": Contender(torchattacks),
        "foolbox": Contender(foolbox),
        "eager, compiled model": Contender(compiled, compiled=True),
    },
    reference="eager",
    passes=lambda setting: PASSES,
    tolerance={"fp32": 1e-2, "bf16": 0.1, "fp16": 0.1},
    others=_others,
)

if __name__ == "__main__":
    main(CONTEST, __doc__, "preactresnet-18", 64)
