"""One AT-EMR training step: emr_training, the released step in eager PyTorch, and what torch.compile makes of it.

    python -m benchmarks.training --model preactresnet-18 --batch 128
    python -m benchmarks.training --model wrn-34-10 --batch 128 --device cuda --precision bf16 --compile
    python -m benchmarks.training --quick

A step is PGD-10 on the evaluation-mode network from the image itself, cross-entropy at the adversarial example in
training mode, the EMR penalty there (strength 3, T = 40, as the released code has it), and SGD's update. After the
first step all contenders must have the same gradients, parameters and BatchNorm statistics.

The bound is the time of the same products alone, in the faster of the two memory formats: ten forwards and data
gradients (attack); a forward, a data and a weight gradient (cross-entropy); two forwards, a data and a weight gradient
(penalty). Times are medians of interleaved repetitions in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import attacks, penalty
from benchmarks.contest import Answer, Contender, Contest, Runner, gradients, main
from benchmarks.products import Passes
from benchmarks.setting import Setting
from emr_training.attacks import PGD
from emr_training.defenses import PGDAT
from emr_training.penalties import EMR

STRENGTH, TEMPERATURE = 3.0, 40.0
PASSES = attacks.PASSES + Passes(forward=1, data=1, weight=1, images=0) + penalty.PASSES


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The released code's, but for a smaller rate: the same batch comes again and again."""
    return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)


def state(model: nn.Module) -> Callable[[Any], Answer]:
    """Gradients, parameters and statistics, as they are when it is called."""
    return lambda _: {
        "gradients": gradients(model),
        "parameters": list(model.parameters()),
        "statistics": [b for b in model.buffers() if b.is_floating_point()],
    }


def ours(setting: Setting, layout: str, graph: bool = False) -> Runner:
    """emr_training's defense and penalty, in a loop of one's own."""
    model, x, y = setting.make(layout)
    attack = PGD(attacks.EPSILON, attacks.STEPS, attacks.STEP_SIZE, random_start=False, keep="last", graph=graph)
    defense = PGDAT(attack, (EMR(model, STRENGTH, TEMPERATURE, {"graph": graph}),))
    optimizer = sgd(model)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        with setting.autocast():
            loss = defense(model, x, y).total
        loss.backward()
        optimizer.step()

    return Runner(step, state(model))


def released(
    setting: Setting,
    layout: str,
    frozen: bool = False,
    quick: Callable[[nn.Module], attacks.Logits] = lambda model: model,
    whole_penalty: bool = False,
) -> Runner:
    """The released step: an eager attack and double backward.

    frozen: the attack does not differentiate parameters. quick: the model's form in attack and cross-entropy.
    whole_penalty: the penalty is compiled as one graph, its inner gradient with it.
    """
    model, x, y = setting.make(layout)
    logits, parameters = quick(model), list(model.parameters())
    optimizer = sgd(model)

    def squared_norm(leaf: Tensor) -> Tensor:
        return penalty.squared_norm(model, leaf, setting, TEMPERATURE)

    regularizer = torch.compile(squared_norm, fullgraph=True) if whole_penalty else squared_norm
    traced: dict[str, Any] = {"trace_autograd_ops": True} if whole_penalty else {}

    def step() -> None:
        model.eval().requires_grad_(not frozen)
        x_adv = attacks.ascent(logits, x, y, setting)
        model.train().requires_grad_(True)
        optimizer.zero_grad()
        with setting.autocast():
            found = logits(x_adv)
        loss = F.cross_entropy(found.to(x.dtype), y)
        model.eval()
        with torch._dynamo.config.patch(traced):
            (loss + STRENGTH * regularizer(x_adv.requires_grad_())).backward(inputs=parameters)
        model.train()
        optimizer.step()

    return Runner(step, state(model))


def at_its_best(setting: Setting, layout: str) -> Runner:
    """Eager, parameters frozen in the attack."""
    return released(setting, layout, frozen=True)


def compiled_model(setting: Setting, layout: str) -> Runner:
    """`torch.compile(model)` in attack and cross-entropy; the double backward, which it refuses, eager."""
    return released(setting, layout, frozen=True, quick=torch.compile)


def compiled_parts(setting: Setting, layout: str) -> Runner:
    """The same with the penalty compiled whole."""
    return released(setting, layout, frozen=True, quick=torch.compile, whole_penalty=True)


def as_shipped(setting: Setting, layout: str) -> Runner:
    """The released code itself runs in float32."""
    return released(setting.with_(precision="fp32"), layout)


def _others(setting: Setting) -> Mapping[str, tuple[Contender, str]]:
    found: dict[str, Any] = {}
    if setting.precision not in ("fp32", "fp64"):
        found["released step as shipped, float32, nchw"] = (Contender(as_shipped), "nchw")
    if setting.place.type == "cuda":
        for layout in setting.layouts:
            graphed = Contender(lambda setting, layout: ours(setting, layout, graph=True), "ours")
            found[f"emr_training, CUDA graphs, {layout}"] = (graphed, layout)
    return found


CONTEST = Contest(
    name="training",
    title="AT-EMR step",
    ways={
        "released step, eager": Contender(released),
        "eager, frozen in the attack": Contender(at_its_best),
        "emr_training": Contender(ours, "ours"),
        "compiled model": Contender(compiled_model, compiled=True),
        "compiled model and penalty": Contender(compiled_parts, compiled=True),
    },
    reference="released step, eager",
    passes=lambda setting: PASSES,
    # A pixel whose gradient is nearly zero steps the other way after another rounding, and all that follows differs.
    tolerance={"fp32": 0.3, "bf16": 0.7, "fp16": 0.5},
    others=_others,
)

if __name__ == "__main__":
    main(CONTEST, __doc__, "preactresnet-18", 32)
