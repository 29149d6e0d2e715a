"""The losses of adversarial training and their gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from emr_kernels.triton import common
from emr_kernels.triton.rows import complement, largest, log_one_plus, place_of, read, read_at, tiling, value_of


@triton.jit
def robust_losses_kernel(
    adversarial,
    clean,
    y,
    weights,
    loss,
    adversarial_grad,
    clean_grad,
    beta,
    smoothing,
    slope,
    bias,
    rows,
    classes,
    KIND: tl.constexpr,
    SMOOTH: tl.constexpr,
    MAIL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = n < rows
    order_1, order_2, _, _ = largest(adversarial, n, rows, classes, 2, ROWS, BLOCK)
    top, first = value_of(order_1), place_of(order_1)
    label = first.to(tl.int64) if y is None else tl.load(y + n, mask=inside, other=0)
    rival = tl.where(first == label, place_of(order_2), first)
    at_label = read_at(adversarial, n, label, rows, classes)
    at_rival = tl.where(first == label, value_of(order_2), top)
    # A row whose largest is not finite, or whose label is out of range, is NaN throughout.
    valid = tl.where((label >= 0) & (label < classes), 0.0, float("nan"))
    rest = (top - top) + valid
    clean_top = top
    clean_first = first
    clean_rest = rest
    clean_at_label = at_label
    if KIND != "ce":
        clean_1, _, _, _ = largest(clean, n, rows, classes, 1, ROWS, BLOCK)
        clean_top, clean_first = value_of(clean_1), place_of(clean_1)
        clean_rest = (clean_top - clean_top) + valid
        clean_at_label = read_at(clean, n, label, rows, classes)

    spread = tl.zeros([ROWS], tl.float32)
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        here = (k < classes)[None, :]
        below = read(adversarial, n, k, rows, classes) - top[:, None]
        rest += tl.sum(tl.where(here & (k[None, :] != first[:, None]), tl.exp(below), 0.0), 1)
        if KIND != "ce":
            below = read(clean, n, k, rows, classes) - clean_top[:, None]
            clean_rest += tl.sum(tl.where(here & (k[None, :] != clean_first[:, None]), tl.exp(below), 0.0), 1)
        if SMOOTH:
            spread -= tl.sum(tl.where(here, below, 0.0), 1)
    log_total, clean_log_total = log_one_plus(rest), log_one_plus(clean_rest)
    scale, clean_scale = 1 / (1 + rest), 1 / (1 + clean_rest)

    # KL(clean || adversarial), for MART with log(p' + 1e-12), and there the sum of p * u, u = 1e-12 / (p' + 1e-12).
    divergence = tl.zeros([ROWS], tl.float32)
    missing = tl.zeros([ROWS], tl.float32)
    if KIND != "ce":
        for start in range(0, classes, BLOCK):
            k = start + tl.arange(0, BLOCK)
            here = (k < classes)[None, :]
            below = read(adversarial, n, k, rows, classes) - top[:, None]
            clean_below = read(clean, n, k, rows, classes) - clean_top[:, None]
            p = tl.exp(clean_below) * clean_scale[:, None]
            if KIND == "mart":
                floored = tl.exp(below) * scale[:, None] + 1e-12
                d = (clean_below - clean_log_total[:, None]) - tl.log(floored)
                missing += tl.sum(tl.where(here, p * (1e-12 / floored), 0.0), 1)
            else:
                d = (clean_below - below) - (clean_log_total - log_total)[:, None]
            divergence += tl.sum(tl.where(here & (p != 0), p * d, 0.0), 1)

    e_label, e_rival = tl.exp(at_label - top), tl.exp(at_rival - top)
    weight = tl.full([ROWS], 1.0, tl.float32)
    if weights is not None:
        weight = tl.load(weights + n, mask=inside, other=0)
    if MAIL:
        weight = weight * 3 / (1 + tl.exp(-slope * ((e_rival * scale - e_label * scale) + bias)))
    uniform = smoothing / classes

    # The cross-entropy, plain, smoothed or boosted, and what multiplies the divergence.
    ratio = tl.zeros([ROWS], tl.float32)
    share = weight
    own = weight
    if KIND == "trades":
        cross = clean_log_total - (clean_at_label - clean_top)
        share = beta * weight
    else:
        cross = log_total - (at_label - top)
    if SMOOTH:
        smooth = uniform * spread + smoothing * (clean_log_total if KIND == "trades" else log_total)
        cross = (1 - smoothing) * cross + smooth
    clean_e_label = tl.exp(clean_at_label - clean_top)
    clean_left = complement(label, clean_e_label, clean_first, clean_rest)
    if KIND == "mart":
        room = complement(rival, e_rival, first, rest) + 1e-4
        ratio = e_rival * scale / room
        cross -= tl.log(room)
        share = beta * (clean_left + 1e-7)
    if KIND == "ce":
        value = weight * cross
    elif KIND == "kl":
        value = share * divergence
    elif KIND == "trades":
        value = cross + share * divergence
    else:
        value = weight * cross + share * divergence
    tl.store(loss + n, value, mask=inside)

    label, rival, first, clean_first = label[:, None], rival[:, None], first[:, None], clean_first[:, None]
    own, ratio, share = own[:, None], ratio[:, None], share[:, None]
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        stored = inside[:, None] & (k < classes)
        below = read(adversarial, n, start + tl.arange(0, BLOCK), rows, classes) - top[:, None]
        e = tl.exp(below)
        p = e * scale[:, None]
        left = complement(k, e, first, rest[:, None])
        gradient = tl.zeros([ROWS, BLOCK], tl.float32)
        if KIND == "ce" or KIND == "mart":
            part = (1 - ratio) * p
            if KIND == "mart":
                part = tl.where(k == rival, p + ratio * left, part)
            part = tl.where(k == label, -left - ratio * p, part)
            if SMOOTH:
                part += tl.where(k == label, smoothing, 0.0) - uniform
            gradient += own * part
        if KIND != "ce":
            clean_below = read(clean, n, start + tl.arange(0, BLOCK), rows, classes) - clean_top[:, None]
            clean_e = tl.exp(clean_below)
            clean_p = clean_e * clean_scale[:, None]
            clean_rests = complement(k, clean_e, clean_first, clean_rest[:, None])
            # Where one class is first in both, their complements tell the two apart.
            difference = tl.where((k == first) & (k == clean_first), clean_rests - left, p - clean_p)
            d = (clean_below - below) - (clean_log_total - log_total)[:, None]
            if KIND == "mart":
                floored = p + 1e-12
                d = (clean_below - clean_log_total[:, None]) - tl.log(floored)
                difference += clean_p * (1e-12 / floored) - p * missing[:, None]
            gradient += share * difference
            pulled = share * tl.where(clean_p == 0, 0.0, clean_p * (d - divergence[:, None]))
            away = tl.where(k == label, -clean_rests, clean_p)
            if KIND == "trades":
                pulled += away
            if SMOOTH:
                pulled += tl.where(k == label, smoothing, 0.0) - uniform
            if KIND == "mart":
                pulled += beta * (divergence * clean_e_label * clean_scale)[:, None] * away
            tl.store(clean_grad + n[:, None] * classes + k, pulled, mask=stored)
        tl.store(adversarial_grad + n[:, None] * classes + k, gradient, mask=stored)


def robust_losses(
    adversarial: torch.Tensor,
    clean: torch.Tensor | None,
    y: torch.Tensor | None,
    weights: torch.Tensor | None,
    kind: str,
    beta: float,
    smoothing: float,
    mail: bool,
    slope: float,
    bias: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`emr::robust_losses`."""
    rows, classes = adversarial.shape
    loss = adversarial.new_empty((rows,), dtype=torch.float32)
    grad = torch.empty_like(adversarial, dtype=torch.float32)
    clean_grad = grad.new_empty((0,)) if clean is None else torch.empty_like(grad)
    tile = tiling(classes)
    if kind == "mart" and tile["num_warps"] == 8:
        # Its two tiles and their sums take more registers than eight warps have.
        tile["num_warps"] = 16
    arguments = (adversarial, clean, y, weights, loss, grad, clean_grad, beta, smoothing, slope, bias, rows, classes)
    constants: dict[str, Any] = {"KIND": kind, "SMOOTH": smoothing != 0, "MAIL": mail}
    grid = common.cdiv(rows, tile["ROWS"])
    common.launch(robust_losses_kernel, grid, adversarial, *arguments, **constants, **tile)
    return loss, grad, clean_grad


def examples() -> None:
    """Launches for `check`."""
    y = torch.empty(128, dtype=torch.int64, device="meta")
    weights = torch.empty(128, device="meta")
    for dtype, classes in ((torch.float32, 10), (torch.bfloat16, 1000), (torch.float16, 50000)):
        logits = torch.empty(128, classes, dtype=dtype, device="meta")
        robust_losses(logits, logits, y, weights, "mart", 6.0, 0.0, True, 10.0, -0.5)
        robust_losses(logits, logits, y, None, "trades", 6.0, 0.1, False, 0.0, 0.0)
    logits = torch.empty(128, 10, device="meta")
    robust_losses(logits, None, y, weights, "ce", 1.0, 0.1, True, 10.0, -0.5)
    robust_losses(logits, logits, None, None, "kl", 1.0, 0.0, False, 0.0, 0.0)
