"""Effective weights of all classes: emr_kernels, torch.func, and one backward pass for each class.

    python -m benchmarks.effective_weights
    python -m benchmarks.effective_weights --model cnn --batch 64

"vmap(jacrev)" is the Jacobian of one sample, mapped over the batch; "jacrev of the sum" that of the logits summed over
the batch; "autograd" one backward pass for each class. The bound is the time of the same products alone: the forward's,
and one data gradient of each layer for each class. For a multilayer perceptron, what leaves out the units that are off
may beat it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from benchmarks.contest import Answer, Contender, Contest, Runner, main
from benchmarks.products import Passes
from benchmarks.setting import Setting
from emr_kernels import effective_weights


def _weights(found: Tensor) -> Answer:
    return {"weights": [found]}


def by_kernels(setting: Setting, layout: str) -> Runner:
    """emr_kernels, its export in the first call."""
    model, x, _ = setting.make(layout)
    model.requires_grad_(False)

    def step() -> Tensor:
        with setting.autocast():
            return effective_weights(model, x)

    return Runner(step, _weights)


def by_vmap(setting: Setting, layout: str) -> Runner:
    """The Jacobian of one sample for every sample."""
    model, x, _ = setting.make(layout)
    tensors = {**dict(model.requires_grad_(False).named_parameters()), **dict(model.named_buffers())}
    jacobian: Callable[[Tensor], Tensor] = vmap(jacrev(lambda x: functional_call(model, tensors, (x[None],))[0]))

    def step() -> Tensor:
        with setting.autocast():
            return jacobian(x)

    return Runner(step, _weights)


def by_sum(setting: Setting, layout: str) -> Runner:
    """The Jacobian of the summed logits: no sample's logits depend on another's input."""
    model, x, _ = setting.make(layout)
    model.requires_grad_(False)
    jacobian = jacrev(lambda x: model(x).sum(0))

    def step() -> Tensor:
        with setting.autocast():
            return jacobian(x).movedim(0, 1)

    return Runner(step, _weights)


def by_autograd(setting: Setting, layout: str) -> Runner:
    """One backward pass for each class."""
    model, x, _ = setting.make(layout)
    model.requires_grad_(False)

    def step() -> Tensor:
        leaf = x.clone().requires_grad_()
        with setting.autocast():
            logits = model(leaf)
        rows = [torch.autograd.grad(z.sum(), leaf, retain_graph=True)[0] for z in logits.unbind(1)]
        return torch.stack(rows, 1)

    return Runner(step, _weights)


CONTEST = Contest(
    name="effective_weights",
    title="Effective weights of all classes",
    ways={
        "autograd": Contender(by_autograd),
        "emr_kernels": Contender(by_kernels, "ours"),
        "vmap(jacrev)": Contender(by_vmap),
        "jacrev of the sum": Contender(by_sum),
    },
    reference="autograd",
    passes=lambda setting: Passes(1, setting.classes, 0, setting.classes),
    tolerance={"fp32": 1e-2, "bf16": 0.3, "fp16": 0.1},
)

if __name__ == "__main__":
    main(CONTEST, __doc__, "mlp-1024-1024-1024", 256)
