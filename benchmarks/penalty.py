"""EMR penalty and its parameter gradient: emr_kernels, double backward, torch.func compiled, finite differences.

    python -m benchmarks.penalty --model wrn-16-4 --batch 64
    python -m benchmarks.penalty --model wrn-34-10 --batch 128 --device cuda --precision bf16

The bound is the time of the same products alone: two forwards, one data gradient and one weight gradient of each layer,
in the faster of the two memory formats; the limit their operations and bytes at the machine's measured ceilings. Times
are medians of interleaved repetitions in one process. Memory is told twice, each contender in a process of its own: the
largest sum of tensors alive at once over the call (beyond those that were there before it), which repeats to the byte,
and on the CPU the resident set's peak, with Python, torch and scratch memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from benchmarks.contest import Contender, Contest, Runner, gradients, main
from benchmarks.products import Passes
from benchmarks.setting import Setting
from emr_kernels import EffectiveWeightPenalty

TEMPERATURE = 1.0
PASSES = Passes(forward=2, data=1, weight=1, images=1)


def squared_norm(model: nn.Module, leaf: Tensor, setting: Setting, temperature: float = TEMPERATURE) -> Tensor:
    """The penalty as the released EMR code has it: the effective weight with a graph, squared."""
    with setting.autocast():
        logits = model(leaf)
    logits = logits.to(leaf.dtype)
    mix = torch.softmax(logits / temperature, 1).detach()
    (weight,) = torch.autograd.grad((mix * logits).sum() / len(leaf), leaf, create_graph=True)
    return weight.square().sum()


def double_backward(setting: Setting, layout: str) -> Runner:
    """The released EMR code's way, without the gradient in the image that nobody asks for."""
    model, x, _ = setting.make(layout)
    parameters = list(model.parameters())

    def step() -> None:
        model.zero_grad(set_to_none=True)
        squared_norm(model, x.detach().requires_grad_(), setting).backward(inputs=parameters)

    return Runner(step, lambda _: {"gradients": gradients(model)})


def as_shipped(setting: Setting, layout: str) -> Runner:
    """The released code itself runs in float32."""
    return double_backward(setting.with_(precision="fp32"), layout)


def linear_passes(setting: Setting, layout: str, graph: bool = False) -> Runner:
    """emr_kernels."""
    model, x, _ = setting.make(layout)
    penalty = EffectiveWeightPenalty(model, temperature=TEMPERATURE, checks="never", graph=graph)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with setting.autocast():
            value = penalty(x)
        value.backward()
        assert penalty.engine == "linearized", penalty.engine_reason

    return Runner(step, lambda _: {"gradients": gradients(model)})


def nested_grad(setting: Setting, layout: str) -> Runner:
    """torch.func.grad of torch.func.grad, compiled into one graph."""
    model, x, _ = setting.make(layout)

    def value(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        def mixed(x: Tensor) -> Tensor:
            with setting.autocast():
                logits = functional_call(model, parameters, (x,))
            logits = logits.to(x.dtype)
            mix = torch.softmax(logits / TEMPERATURE, 1).detach()
            return (mix * logits).sum() / len(x)

        weight: Tensor = grad(mixed)(x)
        return weight.square().sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    compiled = torch.compile(grad(value), fullgraph=True)
    return Runner(lambda: compiled(parameters, x), lambda found: {"gradients": list(found.values())})


def compiled_double_backward(setting: Setting, layout: str) -> Runner:
    """The released code's way, the whole of it traced: inner gradient and all."""
    model, x, _ = setting.make(layout)
    leaf = x.detach().requires_grad_()
    compiled = torch.compile(lambda leaf: squared_norm(model, leaf, setting), fullgraph=True)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        leaf.grad = None
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            compiled(leaf).backward()

    return Runner(step, lambda _: {"gradients": gradients(model)})


def finite_differences(setting: Setting, layout: str, distance: float = 0.01) -> Runner:
    """|w|^2 from the mixed logit at x and beside it, along w: no double backward, and not the same number.

    Finlay and Oberman 2019, with the effective weight in place of the loss's gradient.
    """
    model, x, _ = setting.make(layout)
    parameters = list(model.parameters())
    rows = (-1, *[1] * (x.dim() - 1))

    def mixed(x: Tensor, mix: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with setting.autocast():
            logits = model(x)
        logits = logits.to(x.dtype)
        mix = torch.softmax(logits / TEMPERATURE, 1).detach() if mix is None else mix
        return (mix * logits).sum(1), mix

    def step() -> None:
        model.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        here, mix = mixed(leaf)
        (weight,) = torch.autograd.grad(here.sum(), leaf, retain_graph=True)
        unit = weight / weight.flatten(1).norm(dim=1).clamp_min(1e-12).view(rows)
        there, _ = mixed(x + distance * unit, mix)
        (((there - here) / distance).square().sum() / len(x) ** 2).backward(inputs=parameters)

    return Runner(step, lambda _: {"gradients": gradients(model)})


def _others(setting: Setting) -> Mapping[str, tuple[Contender, str]]:
    found: dict[str, Any] = {}
    if setting.precision not in ("fp32", "fp64"):
        found["double backward as shipped, float32, nchw"] = (Contender(as_shipped), "nchw")
    if setting.place.type == "cuda":
        for layout in setting.layouts:
            graphed = Contender(lambda setting, layout: linear_passes(setting, layout, graph=True), "ours")
            found[f"emr_kernels, CUDA graph, {layout}"] = (graphed, layout)
    return found


CONTEST = Contest(
    name="penalty",
    title="EMR penalty and parameter gradient",
    ways={
        "double backward": Contender(double_backward),
        "emr_kernels": Contender(linear_passes, "ours"),
        "finite differences": Contender(finite_differences, "approximate"),
        "torch.func.grad twice, compiled": Contender(nested_grad, compiled=True),
        "double backward, compiled whole": Contender(compiled_double_backward, compiled=True),
    },
    reference="double backward",
    passes=lambda setting: PASSES,
    # Rounding moves units over their kinks, each with its whole share of the gradient.
    tolerance={"fp32": 2e-2, "bf16": 0.5, "fp16": 0.2},
    others=_others,
)

if __name__ == "__main__":
    main(CONTEST, __doc__, "wrn-16-4", 64)
