"""The micro-benchmarks: entries compute what operators do, wrong results are found, winners told right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.micro import rows, table
from benchmarks.micro.checking import deviation, error_of
from benchmarks.micro.entries import ENTRIES, Entry, Make
from emr_kernels.ops import _dispatch, _winners

SMALL = [entry for entry in ENTRIES if entry.size == 0]


def row(operator: str, contender: str, seconds: float, numel: int = 1000, **fields: Any) -> dict[str, Any]:
    base = {"operator": operator, "case": "", "shape": str(numel), "dtype": "float32", "layout": "nchw"}
    timed = {"seconds": seconds, "launched_seconds": seconds, "rate": 1e9, "unit": "B/s", "fraction": 0.5}
    return {**base, "contender": contender, "numel": numel, **timed, "error": None, **fields}


@torch.no_grad()
@pytest.mark.parametrize("entry", SMALL, ids=lambda entry: entry.name)
def test_eager_formulas_and_operators_agree(entry: Entry) -> None:
    for dtype in entry.dtypes:
        make = Make(torch.device("cpu"), dtype, entry.layouts[-1], torch.Generator().manual_seed(3))
        assert deviation(entry, entry.eager, True, entry.make(make), dtype) <= 1
        operator = _dispatch.operators[entry.operator].overload
        assert deviation(entry, operator, False, entry.make(make), dtype) <= 1


def test_wrong_results_are_found() -> None:
    right = torch.randn(1000)
    for place, value in ((3, math.nan), (5, math.inf), (7, 9.0)):
        wrong = right.clone()
        wrong[place] = value
        assert error_of(wrong, right, 1e-5) > 1
    assert error_of(right + 1e-4, right, 1e-5) > 1 and error_of(right.clone(), right, 1e-5) == 0
    assert error_of(right.double(), right, 1e-5) == math.inf and error_of(right[:9], right, 1e-5) == math.inf
    infinite = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    assert error_of(infinite.clone(), infinite, 1e-5) == 0 and error_of(-infinite, infinite, 1e-5) == math.inf
    bits = torch.zeros(1000, dtype=torch.bool)
    assert error_of(~bits, bits, 0.0) > 1


def test_winners_serve_the_sizes_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {2**10: (2.0, 1.0), 2**16: (2.0, 1.9), 2**22: (1.0, 1.5), 2**26: (1.0, 0.995)}
    found = [
        row("affine_relu_out", contender, seconds, numel)
        for numel, pair in times.items()
        for contender, seconds in zip(("cuda", "triton"), pair, strict=True)
    ]
    found += [
        row("pack_bits", "cuda", 1.0),
        row("sq_norms", "cuda", 1.0),
        row("sq_norms", "triton", 0.5, error="wrong"),
    ]
    measured = rows.winners(found)
    # Triton up to 2**16 elements; then CUDA, also where they are as good as equal.
    assert measured == {name: [(20, "triton"), (64, "cuda")] for name in ("affine_relu_out", "affine_relu")}
    monkeypatch.setattr(_winners, "MEASURED", measured)
    for numel, first in ((2**10, "triton"), (2**16, "triton"), (2**22, "cuda"), (2**40, "cuda")):
        assert _winners.order("affine_relu", numel.bit_length())[0] == first
    duel = rows.duels(found)[0]
    assert duel["winner"] == "triton" and duel["launched"] == pytest.approx(0.5)


def test_rows_are_read_whole_or_cut_off(tmp_path: Path) -> None:
    about = {
        "environment": {"device": "d", "torch": "t", "threads": 1, "date": "2026-01-01"},
        "ceilings": {"copy": 1e9},
    }
    first, again, other = row("op", "cpu", 1.0), row("op", "cpu", 2.0), row("op", "eager", 4.0)
    lines = tmp_path / "lines"
    text = "\n".join(map(json.dumps, (about, first, again, other)))
    lines.write_text(text + '\n{"operator": "cut')
    whole = tmp_path / "whole"
    whole.write_text(json.dumps({**about, "rows": [again, other]}))
    assert rows.read(lines) == rows.read(whole) == (about, [again, other])
    assert table.heading(about).startswith("d, torch t")
    lines_of_table = table.table([again, other, row("bad", "cpu", 0, error="differs")]).splitlines()
    assert "2 s" in lines_of_table[2] and "2.0x" in lines_of_table[2] and "1 GB/s" in lines_of_table[2]
    assert "failed" in lines_of_table[3]
