"""Effective margins of a test set: emr_kernels, a loop over jacrev, and one backward pass for each class.

    python -m benchmarks.margins --model cnn --batch 256

The margin of an image is the least (f_y - f_j) / |w_y - w_j|_2 over the other classes j: the distance to the boundary
of the linear map at the image. All go through the set in batches of 256.
The bound is the time of the same products alone: a forward, and a data gradient of each layer for each class but one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from benchmarks.contest import Answer, Contender, Contest, Runner, main
from benchmarks.products import Passes
from benchmarks.setting import Setting
from emr_kernels import effective_margins

CHUNK = 256


def _margins(found: Tensor) -> Answer:
    return {"margins": [found]}


def least_margin(logits: Tensor, weights: Tensor, y: Tensor) -> Tensor:
    """The formula: logits [N, C], weights [N, C, ...], labels [N] -> [N]."""
    rows = torch.arange(len(y), device=y.device)
    weights = weights.flatten(2)
    gaps = logits[rows, y][:, None] - logits
    margins = gaps / (weights[rows, y][:, None] - weights).norm(dim=2)
    margins[rows, y] = torch.inf
    return margins.amin(1)


def by_kernels(setting: Setting, layout: str) -> Runner:
    """emr_kernels."""
    model, x, y = setting.make(layout)
    model.requires_grad_(False)

    def step() -> Tensor:
        with setting.autocast():
            return effective_margins(model, x, y, batch_size=CHUNK)

    return Runner(step, _margins)


def _in_chunks(
    x: Tensor, y: Tensor, logits_and_weights: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Callable[[], Tensor]:
    def step() -> Tensor:
        found = [
            least_margin(*logits_and_weights(part), labels)
            for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True)
        ]
        return torch.cat(found)

    return step


def by_jacrev(setting: Setting, layout: str) -> Runner:
    """vmap(jacrev), batch by batch."""
    model, x, y = setting.make(layout)
    tensors = {**dict(model.requires_grad_(False).named_parameters()), **dict(model.named_buffers())}

    def twice(sample: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = functional_call(model, tensors, (sample[None],))[0]
        return logits, logits

    both = vmap(jacrev(twice, has_aux=True))

    def logits_and_weights(part: Tensor) -> tuple[Tensor, Tensor]:
        with setting.autocast():
            weights, logits = both(part)
        return logits.to(part.dtype), weights

    return Runner(_in_chunks(x, y, logits_and_weights), _margins)


def by_autograd(setting: Setting, layout: str) -> Runner:
    """One backward pass for each class."""
    model, x, y = setting.make(layout)
    model.requires_grad_(False)

    def logits_and_weights(part: Tensor) -> tuple[Tensor, Tensor]:
        leaf = part.clone().requires_grad_()
        with setting.autocast():
            logits = model(leaf)
        rows = [torch.autograd.grad(z.sum(), leaf, retain_graph=True)[0] for z in logits.unbind(1)]
        return logits.detach().to(part.dtype), torch.stack(rows, 1)

    return Runner(_in_chunks(x, y, logits_and_weights), _margins)


CONTEST = Contest(
    name="margins",
    title="Effective margins",
    ways={
        "autograd": Contender(by_autograd),
        "emr_kernels": Contender(by_kernels, "ours"),
        "jacrev loop": Contender(by_jacrev),
    },
    reference="autograd",
    passes=lambda setting: Passes(1, setting.classes - 1, 0, setting.classes - 1),
    tolerance={"fp32": 1e-2, "bf16": 0.3, "fp16": 0.1},
)

if __name__ == "__main__":
    main(CONTEST, __doc__, "cnn", 256)
