"""Seeds of backward passes, losses and margins from the logits."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from emr_kernels.triton import common
from emr_kernels.triton.rows import complement, largest, log_one_plus, place_of, read, read_at, tiling, value_of


@triton.jit
def logit_seeds_kernel(
    logits,
    y,
    target,
    seed,
    loss,
    margin,
    runner_up,
    probability_margin,
    temperature,
    rows,
    classes,
    KIND: tl.constexpr,
    CENTER: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = n < rows
    order_1, order_2, order_3, order_4 = largest(logits, n, rows, classes, RANKS, ROWS, BLOCK)
    top, first = value_of(order_1), place_of(order_1)
    label = first.to(tl.int64) if y is None else tl.load(y + n, mask=inside, other=0)
    goal = label
    if target is not None:
        goal = tl.load(target + n, mask=inside, other=0)
    rival = tl.where(first == label, place_of(order_2), first)
    at_label = read_at(logits, n, label, rows, classes)
    at_rival = tl.where(first == label, value_of(order_2), top)
    at_goal = read_at(logits, n, goal, rows, classes)

    # A row whose largest is not finite is NaN throughout.
    rest = top - top
    tempered_rest = rest
    product = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        z = read(logits, n, k, rows, classes)
        others = (k < classes)[None, :] & (k[None, :] != first[:, None])
        e = tl.exp(z - top[:, None])
        rest += tl.sum(tl.where(others, e, 0.0), 1)
        if KIND == "softmax":
            e = tl.exp((z - top[:, None]) / temperature)
            tempered_rest += tl.sum(tl.where(others, e, 0.0), 1)
            product += tl.sum(tl.where((k < classes)[None, :] & (e != 0), e * z, 0.0), 1)
        if CENTER:
            total += tl.sum(z, 1)

    # A row whose label is out of range is NaN throughout.
    valid = (label >= 0) & (label < classes) & (goal >= 0) & (goal < classes)
    invalid = tl.where(valid, 0.0, float("nan"))
    shift = invalid
    factor = tl.zeros([ROWS], tl.float32)
    e_label = tl.exp(at_label - top)
    log_total = log_one_plus(rest)
    width = tl.full([ROWS], 1.0, tl.float32)
    ratio = tl.zeros([ROWS], tl.float32)
    if KIND == "softmax" or KIND == "label":
        value = at_label
        if KIND == "softmax":
            factor = 1 / (1 + tempered_rest)
            value = product * factor
        if CENTER:
            shift = shift - 1 / classes.to(tl.float32)
            value = value - total / classes
    elif KIND == "margin":
        value = at_label - at_rival
    elif KIND == "cw":
        value = at_rival - at_label
    elif KIND == "ce":
        factor = 1 / (1 + rest)
        value = log_total - (at_label - top)
    elif KIND == "ce_targeted":
        factor = -1 / (1 + rest)
        value = (at_goal - top) - log_total
    else:
        low = value_of(order_3)
        if KIND == "dlr_targeted":
            low = (low + value_of(order_4)) / 2
        else:
            at_goal = at_rival
            goal = rival
        width = (top - low) + 1e-12
        ratio = (at_label - at_goal) / width
        value = -ratio
    tl.store(loss + n, value + invalid, mask=inside)
    tl.store(margin + n, at_label - at_rival, mask=inside)
    tl.store(runner_up + n, rival.to(tl.int64), mask=inside)
    p_label, p_rival = e_label / (1 + rest), tl.exp(at_rival - top) / (1 + rest)
    tl.store(probability_margin + n, p_label - p_rival, mask=inside)

    label, rival, goal, first = label[:, None], rival[:, None], goal[:, None], first[:, None]
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        values = shift[:, None] + tl.zeros([ROWS, BLOCK], tl.float32)
        if KIND == "softmax" or KIND == "ce" or KIND == "ce_targeted":
            e = read(logits, n, start + tl.arange(0, BLOCK), rows, classes) - top[:, None]
            if KIND == "softmax":
                e = e / temperature
            e = tl.exp(e)
            values += e * factor[:, None]
            if KIND == "ce":
                values = tl.where(k == label, -complement(k, e, first, rest[:, None]), values)
            if KIND == "ce_targeted":
                values = tl.where(k == goal, complement(k, e, first, rest[:, None]), values)
        elif KIND == "label":
            values += tl.where(k == label, 1.0, 0.0)
        elif KIND == "margin":
            values += tl.where(k == label, 1.0, 0.0) - tl.where(k == rival, 1.0, 0.0)
        elif KIND == "cw":
            values += tl.where(k == rival, 1.0, 0.0) - tl.where(k == label, 1.0, 0.0)
        else:
            part, slope = (1 / width)[:, None], (ratio / width)[:, None]
            values += tl.where(k == goal, part, 0.0) - tl.where(k == label, part, 0.0)
            values += tl.where(k == first, slope, 0.0)
            if KIND == "dlr":
                values -= tl.where(k == place_of(order_3)[:, None], slope, 0.0)
            else:
                low_two = (k == place_of(order_3)[:, None]) | (k == place_of(order_4)[:, None])
                values -= tl.where(low_two, slope / 2, 0.0)
        stored = inside[:, None] & (k < classes)
        tl.store(seed + n[:, None] * classes + k, values.to(seed.dtype.element_ty), mask=stored)


def logit_seeds(
    logits: torch.Tensor,
    y: torch.Tensor | None,
    target: torch.Tensor | None,
    kind: str,
    temperature: float,
    center: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`emr::logit_seeds`."""
    rows, classes = logits.shape
    seed = torch.empty_like(logits)
    loss, margin, probability_margin = (logits.new_empty((rows,), dtype=torch.float32) for _ in range(3))
    runner_up = logits.new_empty((rows,), dtype=torch.int64)
    tile = tiling(classes)
    arguments = (logits, y, target, seed, loss, margin, runner_up, probability_margin, temperature, rows, classes)
    constants: dict[str, Any] = {"KIND": kind, "CENTER": center, "RANKS": 4 if kind.startswith("dlr") else 2}
    common.launch(logit_seeds_kernel, common.cdiv(rows, tile["ROWS"]), logits, *arguments, **constants, **tile)
    return seed, loss, margin, runner_up, probability_margin


def examples() -> None:
    """Launches for `check`."""
    y = torch.empty(128, dtype=torch.int64, device="meta")
    for dtype, classes in ((torch.float32, 10), (torch.bfloat16, 1000), (torch.float16, 50000)):
        logits = torch.empty(128, classes, dtype=dtype, device="meta")
        logit_seeds(logits, None, None, "softmax", 40.0, True)
        logit_seeds(logits, y, None, "ce", 1.0, False)
        logit_seeds(logits, y, y, "dlr_targeted", 1.0, False)
    for kind in ("label", "cw", "dlr"):
        logit_seeds(torch.empty(128, 10, device="meta"), y, None, kind, 1.0, False)
    logit_seeds(torch.empty(2**31, 10, device="meta"), None, None, "margin", 1.0, False)
    logit_seeds(torch.empty(128, 100, device="meta"), y, y, "ce_targeted", 1.0, False)
