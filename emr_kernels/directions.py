"""Which effective weight is regularized: class mixes (seeds) computed from the logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from emr_kernels.ops.logit_seeds import logit_seeds

DIRECTIONS = ("softmax", "label", "margin", "all", "random", "cross_entropy")
NEEDS_LABELS = ("label", "margin", "cross_entropy")
_KINDS = {"softmax": "softmax", "label": "label", "margin": "margin", "cross_entropy": "ce"}


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
    has the expectation of the sum over "all". cross_entropy: softmax(f(x)) − e_y, whose effective weight is the
    gradient of the cross-entropy; the one mix that is not held constant, see `seed_derivative`.

    Args:
        logits: `[N, C]`.
        y: class indices `[N]`, for "label", "margin" and "cross_entropy".
        temperature: T of "softmax".
        center: leave out the mean logit, which no prediction depends on: each mix minus its mean over the classes.

    Yields:
        `[N, C]`, without gradient, in float32 (float64 for float64 logits).
    """
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    classes = logits.shape[1]
    if classes == 1:
        # One class has no rival: every mix is that class.
        yield torch.full_like(logits, 0.0 if center or direction in ("margin", "cross_entropy") else 1.0)
    elif direction in _KINDS:
        labels = y if direction in NEEDS_LABELS else None
        yield logit_seeds(logits, labels, kind=_KINDS[direction], temperature=temperature, center=center).seed
    else:
        for seed in _mixes(logits, direction):
            yield seed - seed.sum(1, keepdim=True) / classes if center else seed


def seed_derivative(logits: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    """The derivative of ⟨softmax(f(x)), tangent⟩ in the logits, `[N, C]`: p ⊙ (tangent − ⟨p, tangent⟩)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    p = logits.detach().to(dtype).softmax(1)
    tangent = tangent.to(dtype)
    return p * (tangent - (p * tangent).sum(1, keepdim=True))


def _mixes(logits: torch.Tensor, direction: str) -> Iterator[torch.Tensor]:
    classes = logits.shape[1]
    if direction == "random":
        noise = torch.randn_like(logits)
        yield noise * (classes**0.5 / noise.norm(dim=1, keepdim=True))
        return
    for c in range(classes):
        seed = torch.zeros_like(logits)
        seed[:, c] = 1
        yield seed


def rivals(logits: torch.Tensor, y: torch.Tensor, k: int) -> torch.Tensor:
    """The k classes other than y with the largest logits, strongest first: `[N, k]`; k is at most C - 1."""
    # y itself comes last, also where models mask classes with logits of -inf.
    others = logits.clamp_min(torch.finfo(logits.dtype).min).scatter(1, y[:, None], float("-inf"))
    return others.topk(k, dim=1).indices
