"""Which effective weight is regularized: class mixes (seeds) computed from the logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

DIRECTIONS = ("softmax", "label", "margin", "all", "random")
NEEDS_LABELS = ("label", "margin")


def seeds(
    logits: torch.Tensor,
    y: torch.Tensor | None,
    direction: str,
    temperature: float = 1.0,
    center: bool = False,
) -> Iterator[torch.Tensor]:
    """Class mixes p whose effective weights w_p = Σ_c p_c ∂f_c/∂x are asked for, one after another.

    softmax: softmax(f(x)/T), held constant (the paper). label: e_y. margin: e_y − e_j with j the runner-up, the
    denominator of the effective margin. all: e_1 … e_C. random: √C v, v uniform on the unit sphere; its squared norm
    has the expectation of the sum over "all".

    Args:
        logits: `[N, C]`.
        y: class indices `[N]`, for "label" and "margin".
        temperature: T of "softmax".
        center: leave out the mean logit, which no prediction depends on: each mix minus its mean over the classes.

    Yields:
        `[N, C]`, without gradient, in float32 (float64 for float64 logits).
    """
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    classes = logits.shape[1]
    for seed in _mixes(logits, y, direction, temperature):
        yield seed - seed.sum(1, keepdim=True) / classes if center else seed


def _mixes(logits: torch.Tensor, y: torch.Tensor | None, direction: str, temperature: float) -> Iterator[torch.Tensor]:
    classes = logits.shape[1]
    if direction == "softmax":
        yield torch.softmax(logits / temperature, 1)
    elif direction == "random":
        noise = torch.randn_like(logits)
        yield noise * (classes**0.5 / noise.norm(dim=1, keepdim=True))
    elif direction == "all":
        for c in range(classes):
            seed = torch.zeros_like(logits)
            seed[:, c] = 1
            yield seed
    else:
        assert y is not None
        label = F.one_hot(y, classes).to(logits.dtype)
        yield label if direction == "label" else label - F.one_hot(rivals(logits, y, 1)[:, 0], classes)


def rivals(logits: torch.Tensor, y: torch.Tensor, k: int) -> torch.Tensor:
    """The k classes other than y with the largest logits, strongest first: `[N, k]`."""
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.topk(k, dim=1).indices
