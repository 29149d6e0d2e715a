"""Steps that time themselves: many calls of one function over rotating arguments, on the CPU or a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.measure import copy_ceiling, matmul_ceiling, synchronize

#: One step lasts at least this long, so that starting and ending it does not count.
_LEAST_SECONDS = {"cpu": 2e-4, "cuda": 1e-3}
_MOST_CALLS = 256
#: A benchmark's rounds, those of the ceiling included, take about this long.
_SECONDS = {"cpu": 0.4, "cuda": 0.1}
_LEAST_ROUNDS, _MOST_ROUNDS = 7, 40

Function = Callable[..., Any]


class Step:
    """`calls` calls of a function, one argument set after the other; `seconds` holds the time of each run, per call.

    On a GPU the calls are captured in a CUDA graph where that is possible, so that the device alone is timed, by its
    own events; `run` returns when the device is done.
    """

    def __init__(self, function: Function, sets: Sequence[tuple[Any, ...]], device: torch.device) -> None:
        self._function, self._sets, self.device = function, sets, device
        self.seconds: list[float] = []
        self.calls = 1
        self.captured = False
        for _ in range(2):
            self._loop()
        once = min(self._host_seconds() for _ in range(3))
        wanted = min(_MOST_CALLS, _LEAST_SECONDS[device.type] / max(once, 1e-9))
        self.calls = max(1, round(wanted / len(sets))) * len(sets)
        self.run: Callable[[], None] = self._run_on_host
        if device.type == "cuda":
            self._replay = self._loop
            self._capture()
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.run = self._run_on_device

    def _loop(self) -> None:
        for call in range(self.calls):
            self._function(*self._sets[call % len(self._sets)])

    def _host_seconds(self) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        self._loop()
        synchronize(self.device)
        return (time.perf_counter() - start) / self.calls

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._loop()
        except RuntimeError:
            torch.cuda.synchronize()
            return
        self._replay, self.captured = graph.replay, True
        self._replay()
        torch.cuda.synchronize()

    def _run_on_host(self) -> None:
        self.seconds.append(self._host_seconds())

    def _run_on_device(self) -> None:
        start, end = self._events
        start.record()
        self._replay()
        end.record()
        end.synchronize()
        self.seconds.append(start.elapsed_time(end) * 1e-3 / self.calls)

    def launched_seconds(self, repetitions: int = 5) -> float:
        """Median time of a call that Python launches, one after the other: the launch or the kernel, what is longer."""
        return statistics.median(self._host_seconds() for _ in range(repetitions))


def copy_step(moved: int, sets: int, device: torch.device) -> Step:
    """The memory's ceiling: `copy_` between two buffers, reading and writing `moved` bytes in all."""
    elements = max(1, moved // 8)
    pairs = []
    for _ in range(sets):
        source = torch.randn(elements, device=device)
        pairs.append((torch.empty_like(source).copy_(source), source))
    return Step(torch.Tensor.copy_, pairs, device)


def matmul_step(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> Step:
    """The arithmetic's ceiling: a product of [m, k] and [k, n]."""
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    out = torch.empty(m, n, dtype=dtype, device=device)
    return Step(lambda: torch.mm(a, b, out=out), [()], device)


def rounds_of(step: Step, ceiling: Step) -> int:
    """How often to run two steps in turn; forgets the trial runs."""
    for each in (ceiling, step):
        each.run()
    taken = sum(each.seconds[-1] * each.calls for each in (ceiling, step))
    for each in (ceiling, step):
        each.seconds.clear()
    return max(_LEAST_ROUNDS, min(_MOST_ROUNDS, round(_SECONDS[step.device.type] / taken)))


def figures(step: Step, ceiling: Step, work: int, unit: str) -> dict[str, Any]:
    """What is kept of a benchmark: seconds, rate, and the part of the ceiling that was measured beside it."""
    p20, p80 = (statistics.quantiles(step.seconds, n=5)[place] for place in (0, 3))
    seconds, limit = statistics.median(step.seconds), statistics.median(ceiling.seconds)
    found = {
        "seconds": seconds,
        "p20": p20,
        "p80": p80,
        "rounds": len(step.seconds),
        "rate": work / seconds,
        "unit": unit,
        "ceiling": work / limit,
        "fraction": limit / seconds,
        "error": None,
    }
    if step.device.type == "cuda":
        found |= {"captured": step.captured, "launched_seconds": step.launched_seconds()}
    return found


def ceilings(device: torch.device) -> dict[str, Any]:
    """The machine's best copy, in bytes read and written a second, and its matrix products, in operations a second."""
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    size = 2**30 if device.type == "cuda" else 2**28
    products = {str(dtype).removeprefix("torch."): matmul_ceiling(device, dtype) for dtype in dtypes}
    return {"copy": copy_ceiling(device, size), "matmul": products}
