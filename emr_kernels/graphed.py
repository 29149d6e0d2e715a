"""The penalty's passes as one CUDA graph for each kind of batch: captured once, replayed with one launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from emr_kernels.function import Request, passes
from emr_kernels.linearize.program import Program

Outcome = tuple[torch.Tensor | None, ...]
Result = TypeVar("Result")
#: Graphs kept at once; each holds the memory of one call.
CAPACITY = 8
_WARM_UPS = 3


@dataclass
class _Captured:
    """A graph, the tensors it reads that change from call to call, and those it writes.

    The program is held so that its id in the key stays its own.
    """

    program: Program
    graph: Any
    inputs: list[torch.Tensor]
    outcome: Outcome

    def replay(self, inputs: list[torch.Tensor]) -> Outcome:
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        self.graph.replay()
        # The next replay overwrites these.
        return tuple(None if tensor is None else tensor.clone() for tensor in self.outcome)


class GraphCache:
    """Captures `passes`, and replays them while everything that a graph bakes in stays as it was.

    Attributes:
        reason: why the last call ran without a graph; None if it was replayed.
    """

    def __init__(self) -> None:
        self.reason: str | None = "not called yet"
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._failed: dict[Hashable, str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the module that holds this captures its own graphs.
        return GraphCache, ()

    def run(self, request: Request, x: torch.Tensor, wanted: tuple[bool, ...], wants_x: bool) -> Outcome:
        """`passes`, from a graph where there can be one."""
        self.reason = _reason_against(x)
        if self.reason is not None:
            return passes(request, x, wanted, wants_x)
        key = _key(request, x, wanted, wants_x)
        self.reason = self._failed.get(key)
        if self.reason is not None:
            return passes(request, x, wanted, wants_x)
        inputs = _inputs(request, x)
        captured = self._captured.get(key)
        if captured is None:
            try:
                captured = _capture(request, x, wanted, wants_x)
            except RuntimeError as error:
                self.reason = self._failed[key] = f"capture failed: {str(error).strip().splitlines()[0]}"
                return passes(request, x, wanted, wants_x)
            self._captured[key] = captured
            if len(self._captured) > CAPACITY:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        return captured.replay(inputs)


def _reason_against(x: torch.Tensor) -> str | None:
    if x.device.type != "cuda":
        return f"x is on {x.device}; CUDA graphs are for CUDA devices"
    return "the caller is capturing a graph itself" if torch.cuda.is_current_stream_capturing() else None


def _changing(request: Request) -> list[int]:
    """Values that are computed anew at every call, before the passes."""
    return [n.index for n in request.program.graph.prologue if isinstance(request.values[n.index], torch.Tensor)]


def _inputs(request: Request, x: torch.Tensor) -> list[torch.Tensor]:
    labels = [] if request.y is None else [request.y]
    return [x.detach(), *labels, *(request.values[index].detach() for index in _changing(request))]


def _key(request: Request, x: torch.Tensor, wanted: tuple[bool, ...], wants_x: bool) -> Hashable:
    """Everything that a captured graph has baked in: shapes, options, and where parameters and buffers lie."""
    changing = set(_changing(request))
    fixed = tuple(
        (value.data_ptr(), value.shape, value.stride(), value.dtype)
        for index, value in enumerate(request.values)
        if isinstance(value, torch.Tensor) and index not in changing
    )
    given = tuple((t.shape, t.stride(), t.dtype) for t in _inputs(request, x))
    autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
    precision = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    options = request.options
    return (
        id(request.program), x.device, given, fixed, wanted, wants_x, autocast, precision,
        options.direction, options.temperature, options.center, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _capture(request: Request, x: torch.Tensor, wanted: tuple[bool, ...], wants_x: bool) -> _Captured:
    inputs = [tensor.clone(memory_format=torch.preserve_format) for tensor in _inputs(request, x)]
    changing = _changing(request)
    static_x, *others = inputs
    static_y = None if request.y is None else others.pop(0)
    values = list(request.values)
    for index, static in zip(changing, others, strict=True):
        values[index] = static

    def run() -> Outcome:
        again = Request(request.program, list(values), request.options, static_y, request.factor)
        return passes(again, static_x, wanted, wants_x)

    graph, outcome = record(run, x.device)
    return _Captured(request.program, graph, inputs, outcome)


def record(run: Callable[[], Result], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A CUDA graph of a call, after a few calls to warm up, and the tensors that a replay fills.

    Raises:
        RuntimeError: if the call does something that cannot be captured.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        result = run()
    return graph, result
