"""How the benchmarks measure: interleaved repetitions, peak memory, ceilings of the machine, and where it all ran."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch.profiler import ProfilerActivity, profile

from emr_kernels import _nvcc

ROOT = Path(__file__).resolve().parent.parent
Step = Callable[[], Any]
# The profiler tells of its beginning and end otherwise, and of memory that was there before.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def synchronize(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(step: Step, device: torch.device) -> float:
    """One call's time: CUDA events on a GPU, the clock on a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    steps: Mapping[str, Step], repetitions: int, device: torch.device, warm_up: int = 1
) -> dict[str, dict[str, float]]:
    """Median, least and greatest seconds of each contender, which take turns so that a drift meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(warm_up):
        for step in steps.values():
            step()
    synchronize(device)
    for _ in range(repetitions):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step, device))
    return {
        name: {"median": statistics.median(times), "min": min(times), "max": max(times)}
        for name, times in seconds.items()
    }


def peak_of_tensors(step: Step, device: torch.device) -> int:
    """Largest sum of the tensors that a call has alive at once, beyond those that were there before it."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def resident_peak() -> int:
    """The largest resident set of this process; unlike `getrusage`, not that of what started it."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def memory_of(step: Step, warm_up: Step, device: torch.device) -> dict[str, int]:
    """Peak memory of one call, which should be this process's first of its size.

    `tensors`: see `peak_of_tensors`. On the CPU also the resident set: `before` the call and its `peak`.
    """
    warm_up()  # code and thread pools that any first call loads
    found = {}
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
        found["before"] = _status("VmRSS")
        step()
        found["peak"] = resident_peak()
    found["tensors"] = peak_of_tensors(step, device)
    return found


def in_own_process(module: str, *arguments: str) -> Any:
    """Run a module in a fresh interpreter; the last line it prints, as JSON."""
    run = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"python -m {module} {' '.join(arguments)} failed:\n{run.stderr[-4000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def copy_ceiling(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes per second, read and written, of a copy between two warm buffers of `size` bytes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, 10, device, warm_up=3)
    return 2 * size / times["copy"]["min"]


def matmul_ceiling(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations per second of a square matrix product of random numbers."""
    n = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = interleaved({"product": lambda: torch.mm(a, b, out=out)}, 10, device, warm_up=3)
    return 2 * n**3 / times["product"]["min"]


class Ceilings(TypedDict):
    """What a machine does at its best: bytes per second of a copy, operations per second of products."""

    copy: float
    matmul: float
    convolution: float


def convolution_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a 3x3 convolution of many channels, in the faster memory format."""
    n, channels, side = (64, 512, 28) if device.type == "cuda" else (8, 128, 28)
    best = 0.0
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(n, channels, side, side, device=device, dtype=dtype).contiguous(memory_format=memory_format)
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
        weight = weight.contiguous(memory_format=memory_format)
        with torch.no_grad():
            times = interleaved(
                {"convolution": partial(torch.nn.functional.conv2d, x, weight, padding=1)}, 10, device, warm_up=3
            )
        best = max(best, 2 * x.numel() * channels * 9 / times["convolution"]["min"])
    return best


_BEST: dict[tuple[torch.device, torch.dtype], Ceilings] = {}


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The machine's ceilings: the best that this process has measured, now included.

    A ceiling that was measured while something else ran would be below what it is to bound.
    """
    now: Ceilings = {
        "copy": copy_ceiling(device),
        "matmul": matmul_ceiling(device, dtype),
        "convolution": convolution_ceiling(device, dtype),
    }
    before = _BEST.get((device, dtype), now)
    best: Ceilings = {
        "copy": max(before["copy"], now["copy"]),
        "matmul": max(before["matmul"], now["matmul"]),
        "convolution": max(before["convolution"], now["convolution"]),
    }
    _BEST[device, dtype] = best
    return best


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def slug(device: torch.device) -> str:
    """The device's name as part of a file's."""
    words = "".join(c if c.isalnum() else " " for c in device_name(device).lower()).split()
    return "-".join(words)


def time_text(seconds: float) -> str:
    """With a unit, three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def write_json(path: Path, record: Any) -> None:
    """Write a record whole or not at all, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(path)


def _output(*command: str) -> str | None:
    """What a command prints; None where it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def commit() -> str | None:
    """The checkout's commit, with "+changes" where files differ from it; EMR_COMMIT where there is no repository."""
    found = _output("git", "rev-parse", "HEAD")
    if found is None:
        return os.environ.get("EMR_COMMIT")
    return found + ("+changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def _nvcc_version() -> str | None:
    try:
        told = _output(_nvcc.locate(), "--version")
    except _nvcc.BuildError:
        return None
    match = re.search(r"V(\d[\d.]+)", told or "")
    return match.group(1) if match else None


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the code."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    found = {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "triton": triton_version,
        "nvcc": _nvcc_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": properties.L2_cache_size,
        }
    return found
