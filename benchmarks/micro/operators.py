"""The benchmarks themselves: one for each entry, dtype, memory format and contender; see the package."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.micro import entries, timing
from benchmarks.micro.checking import BACKENDS, contender, deviation, moved_bytes, sets_of
from benchmarks.micro.entries import Entry, Make
from emr_kernels.ops import _dispatch

_SECONDS, _LEAST_ROUNDS, _MOST_ROUNDS = 0.4, 7, 40


@torch.no_grad()
def test_operator(
    benchmark: Any, entry: Entry, layout: str, dtype: torch.dtype, name: str, device: torch.device, rows: Any
) -> None:
    generator = torch.Generator(device).manual_seed(1)
    make = Make(device, dtype, layout, generator)
    inputs = entry.make(make)
    row = {
        "operator": entry.operator,
        "case": entry.case,
        "shape": entry.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
        "contender": name,
        "numel": inputs.on.numel(),
    }
    try:
        function, is_plain = contender(entry, name)
    except _dispatch.BackendUnavailableError as error:
        pytest.skip(f"{entry.operator} on {name}: {error}")
    try:
        found = deviation(entry, function, is_plain, inputs, dtype)
    except Exception as error:
        if name == "compile" and type(error).__module__.startswith("torch._"):
            pytest.skip(f"torch.compile fails: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        raise
    if not found <= 1:
        rows.add({**row, "failed": f"results differ from the reference's: {found:.3g} times what is allowed"})
        pytest.fail(f"not timed: {rows.last['failed']}")

    kernel = _dispatch.operators[entry.operator].reference
    moved = moved_bytes(inputs.arguments, kernel(*inputs.arguments))
    sets = sets_of(entry, inputs, moved, make)
    step = timing.Step(function, [s.plain if is_plain else s.arguments for s in sets], device)
    if entry.matmul is None:
        ceiling, work, unit = timing.copy_step(moved, len(sets), device), moved, "bytes"
    else:
        m, k, n = entry.matmul
        ceiling, work, unit = timing.matmul_step(m, k, n, dtype, device), 2 * m * k * n, "flops"
    ceiling.run(), step.run()
    rounds = round(_SECONDS / (step.seconds[-1] * step.calls + ceiling.seconds[-1] * ceiling.calls))
    rounds = max(_LEAST_ROUNDS, min(_MOST_ROUNDS, rounds))
    step.seconds.clear(), ceiling.seconds.clear()
    # The ceiling is measured between the rounds: what slows the machine down slows both.
    benchmark.pedantic(step.run, setup=ceiling.run, rounds=rounds)
    row |= rows.figures(step, ceiling, work, unit)
    benchmark.extra_info.update(row)
    rows.add(row)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, scale, threads = (metafunc.config.getoption(o) for o in ("--device", "--scale", "--threads"))
    if threads:
        torch.set_num_threads(threads)
    dtypes = (torch.float32, torch.bfloat16)
    parameters, ids = [], []
    for entry in entries.ENTRIES:
        if entry.scale > scale:
            continue
        largest = max(e.scale for e in entries.ENTRIES if e.operator == entry.operator and e.scale <= scale)
        for layout in entry.layouts:
            for dtype in dtypes if entry.operator != "pack_bits" else dtypes[:1]:
                # Compiling takes seconds: once for each operator and dtype, at its largest size.
                compiled = entry.scale == largest and layout == entry.layouts[-1]
                for name in (*BACKENDS[device], "plain", *(["compile"] if compiled else [])):
                    parameters.append((entry, layout, dtype, name))
                    ids.append("-".join((entry.name, layout, str(dtype).removeprefix("torch."), name)))
    metafunc.parametrize(("entry", "layout", "dtype", "name"), parameters, ids=ids)
