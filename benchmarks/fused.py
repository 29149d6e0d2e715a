"""BatchNorm (evaluation mode) and ReLU on the CPU, forward and backward: fused into reused buffers, eager, and a copy.

    python -m benchmarks.fused [--threads 2] [--repetitions 15] [--output FILE]

The copy is the ceiling: `copy_` between two warm buffers of the tensor's size, by as many threads, counting bytes read
and written. The operators read the input and write y and one bit for each element, then read the cotangent and the bits
and write its product: 16.25 bytes for each float32 element. Eager PyTorch computes the same two tensors.

Every contender is timed under two allocators: glibc's default, which gives large tensors back to the system and pays a
page fault for every 4 KiB of a fresh one, and as `emr_kernels.keep_memory` sets it. Times are medians of interleaved
repetitions, each allocator in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import environment, write_json
from benchmarks.setting import FORMATS
from emr_kernels import _extension, keep_memory, ops

SHAPES = ((32, 160, 32, 32), (128, 160, 32, 32))
ALLOCATORS = ("default", "keeps memory")
#: Bytes read and written for each element.
MOVED = {"copy": 8, "forward": 8 + 1 / 8, "backward": 8 + 1 / 8, "fused": 16 + 1 / 4}


def contenders(shape: tuple[int, ...], memory_format: torch.memory_format) -> dict[str, Callable[[], None]]:
    """The timed functions, after a check that fused and eager give the same tensors."""
    generator = torch.Generator().manual_seed(1)
    a, delta, source = (
        torch.randn(shape, generator=generator).contiguous(memory_format=memory_format) for _ in range(3)
    )
    y, result, target = (torch.empty_like(a).fill_(0) for _ in range(3))
    bits = torch.zeros((a.numel() + 7) // 8, dtype=torch.uint8)
    norm = nn.BatchNorm2d(shape[1]).eval().requires_grad_(False)
    nn.init.uniform_(norm.running_mean, -0.1, 0.1)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    leaf = a.clone().requires_grad_()

    def forward() -> None:
        ops.affine_relu(a, scale, shift, out=y, bits_out=bits)

    def backward() -> None:
        ops.affine_relu_vjp(delta, bits, scale, out=result, memory_format=memory_format)

    def fused() -> None:
        forward()
        backward()

    def eager() -> None:
        leaf.grad = None
        F.relu(norm(leaf)).backward(delta)

    fused()
    eager()
    if _extension.library is None:
        sys.exit(f"no compiled operators: {_extension.reason}")
    torch.testing.assert_close(y, F.relu(norm(a)), rtol=1e-5, atol=1e-5)
    # An element within a rounding of the kink may fall on either side of it.
    flipped = int(((result == 0) != (leaf.grad == 0)).sum())
    assert flipped <= 1e-6 * a.numel(), f"{flipped} elements on another side of the kink"
    agree = (result == 0) == (leaf.grad == 0)
    torch.testing.assert_close(result[agree], leaf.grad[agree], rtol=1e-5, atol=1e-5)
    return {
        "copy": lambda: target.copy_(source),
        "forward": forward,
        "backward": backward,
        "fused": fused,
        "eager": eager,
    }


def measure(shape: tuple[int, ...], layout: str, repetitions: int) -> dict[str, dict[str, float]]:
    """Seconds of each contender and page faults of a call, from interleaved repetitions in this process."""
    functions = contenders(shape, FORMATS[layout])
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    faults: dict[str, list[int]] = {name: [] for name in functions}
    for round_ in range(repetitions + 1):
        for name, function in functions.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = time.perf_counter()
            function()
            if round_:
                seconds[name].append(time.perf_counter() - start)
                faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {
        name: {
            "median": statistics.median(times),
            "min": min(times),
            "max": max(times),
            "page_faults": statistics.median(faults[name]),
        }
        for name, times in seconds.items()
    }


def in_own_process(allocator: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """`measure` for every shape and memory format, under an allocator."""
    command = [sys.executable, "-m", "benchmarks.fused", "--inside"]
    command += ["--threads", str(options.threads), "--repetitions", str(options.repetitions)]
    command += ["--keep"] if allocator == "keeps memory" else []
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(run.stderr or run.stdout)
    found: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return [{"allocator": allocator, **case} for case in found]


def report(case: dict[str, Any]) -> dict[str, Any]:
    """The case with its rates and ratios, printed."""
    shape, seconds = case["shape"], case["seconds"]
    elements = 1
    for size in shape:
        elements *= size
    print(f"\n{'x'.join(map(str, shape))}, {case['layout']}, allocator: {case['allocator']}")
    for name, t in seconds.items():
        line = f"  {name:10}{t['median'] * 1e3:9.2f} ms  (min {t['min'] * 1e3:.2f}, max {t['max'] * 1e3:.2f})"
        if name in MOVED:
            line += f"{MOVED[name] * elements / t['median'] * 1e-9:8.1f} GB/s"
        print(line + (f"  {t['page_faults']:.0f} page faults" if t["page_faults"] >= 1000 else ""))
    copy = MOVED["copy"] / seconds["copy"]["median"]
    ratios = {
        "fraction of the copy": MOVED["fused"] / seconds["fused"]["median"] / copy,
        "speed-up over eager": seconds["eager"]["median"] / seconds["fused"]["median"],
    }
    print("  " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    return {**case, "ratios": ratios}


def main() -> None:
    """Measure and print; with --output also write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.keep and not keep_memory():
        sys.exit("error: this C library cannot be told to keep memory; expected glibc")
    if options.inside:
        cases = [
            {"shape": shape, "layout": layout, "seconds": measure(shape, layout, options.repetitions)}
            for shape in SHAPES
            for layout in FORMATS
        ]
        print(json.dumps(cases))
        return
    about = environment(torch.device("cpu"))
    print(f"{about['device']}, {options.threads} threads, torch {about['torch']}, float32")
    cases = [report(case) for allocator in ALLOCATORS for case in in_own_process(allocator, options)]
    for case, kept in zip(cases[: len(cases) // 2], cases[len(cases) // 2 :], strict=True):
        lost = case["seconds"]["eager"]["median"] - kept["seconds"]["eager"]["median"]
        part = lost / case["seconds"]["eager"]["median"]
        print(f"\n{'x'.join(map(str, case['shape']))}, {case['layout']}: page faults cost eager", end=" ")
        print(f"{lost * 1e3:.1f} ms, {part:.0%} of its time")
    if options.output:
        write_json(options.output, {"environment": about, "cases": cases})


if __name__ == "__main__":
    main()
