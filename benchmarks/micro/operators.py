"""The benchmarks themselves: one for each entry, dtype, memory format and contender; see the package."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.micro import timing
from benchmarks.micro.checking import BACKENDS, contender, deviation, moved_bytes, sets_of
from benchmarks.micro.entries import ENTRIES, Entry, Make
from emr_kernels.ops import _dispatch


@torch.no_grad()
def test_operator(
    benchmark: Any, entry: Entry, layout: str, dtype: torch.dtype, name: str, device: torch.device, rows: Any
) -> None:
    row = {
        "operator": entry.operator,
        "case": entry.case,
        "shape": entry.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
        "contender": name,
    }
    if rows.has(row):
        pytest.skip("measured before")
    make = Make(device, dtype, layout, torch.Generator(device).manual_seed(1))
    inputs = entry.make(make)
    row["numel"] = inputs.on.numel()
    try:
        function, is_eager = contender(entry, name)
    except _dispatch.BackendUnavailableError as error:
        pytest.skip(f"{entry.operator} on {name}: {error}")
    try:
        found = deviation(entry, function, is_eager, inputs, dtype)
    except Exception as error:
        if name == "compile" and type(error).__module__.startswith("torch._"):
            pytest.skip(f"torch.compile fails: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        rows.add({**row, "error": f"{type(error).__name__}: {error}"[:500]})
        raise
    if not found <= 1:
        wrong = f"results differ from the reference's, by {found:.3g} times what is allowed"
        rows.add({**row, "error": wrong})
        pytest.fail(f"not timed: {wrong}")

    moved = moved_bytes(inputs.arguments, _dispatch.operators[entry.operator].reference(*inputs.arguments))
    sets = sets_of(entry, inputs, moved, make)
    step = timing.Step(function, [s.eager if is_eager else s.arguments for s in sets], device)
    if entry.matmul is None:
        ceiling, work, unit = timing.copy_step(moved, len(sets), device), moved, "B/s"
    else:
        m, k, n = entry.matmul
        ceiling, work, unit = timing.matmul_step(m, k, n, dtype, device), 2 * m * k * n, "FLOP/s"
    # The ceiling is measured between the rounds: what slows the machine down slows both.
    benchmark.pedantic(step.run, setup=ceiling.run, rounds=timing.rounds_of(step, ceiling))
    row |= timing.figures(step, ceiling, work, unit)
    benchmark.extra_info.update(row)
    rows.add(row)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, sizes, threads = (metafunc.config.getoption(o) for o in ("--device", "--sizes", "--threads"))
    if threads:
        torch.set_num_threads(threads)
    parameters, ids = [], []
    entries = [entry for entry in ENTRIES if str(entry.size) in sizes.split(",")]
    for entry in entries:
        largest = max(e.size for e in entries if e.operator == entry.operator)
        for layout in entry.layouts:
            for dtype in entry.dtypes:
                # Compiling takes seconds: once for each operator, at its largest size.
                compiled = entry.size == largest and layout == entry.layouts[-1] and dtype == entry.dtypes[0]
                for name in (*BACKENDS[device], "eager", *(["compile"] if compiled else [])):
                    parameters.append((entry, layout, dtype, name))
                    ids.append("-".join((entry.name, layout, str(dtype).removeprefix("torch."), name)))
    metafunc.parametrize(("entry", "layout", "dtype", "name"), parameters, ids=ids)
