"""The whole loop of an attack as one CUDA graph for each kind of batch: captured once, replayed with one launch."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from emr_kernels.graphed import CAPACITY, record
from emr_kernels.linearize.wrappers import unwrap
from emr_training.attacks.problem import Problem

#: From a problem and the points to begin with, [N, ...], to those at the end.
Loop = Callable[[Problem, Tensor], Tensor]


@dataclass
class _Captured:
    """A graph, the tensors it reads and writes, and the number of classes that labels are checked against."""

    graph: Any
    inputs: list[Tensor]
    result: Tensor
    classes: int

    def replay(self, inputs: list[Tensor]) -> Tensor:
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        self.graph.replay()
        # The next replay overwrites it.
        return self.result.clone()


#: None where a capture failed.
_GRAPHS: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Hashable, _Captured | None]] = weakref.WeakKeyDictionary()


def run_as_graph(attack: Hashable, problem: Problem, start: Tensor, loop: Loop) -> Tensor | None:
    """`loop(problem, start)` from a CUDA graph; None where there can be none.

    A graph is kept as long as the model, and serves again while the attack, the shapes, the precision and the places of
    parameters and buffers are the same: their values may change.
    """
    if _reason_against(problem) is not None:
        return None
    model = unwrap(problem.classifier.model)  # type: ignore[arg-type]
    kept = _GRAPHS.setdefault(model, OrderedDict())
    key = _key(attack, problem, model)
    if key not in kept:
        kept[key] = _capture(problem, start, loop)
        if len(kept) > CAPACITY:
            kept.popitem(last=False)
    kept.move_to_end(key)
    captured = kept[key]
    if captured is None:
        return None
    for name, labels in (("y", problem.y), ("target", problem.target)):
        if labels is not None and int(labels.max()) >= captured.classes:
            most = f"expected labels below the model's {captured.classes} classes"
            raise ValueError(f"{name} has the label {int(labels.max())}; {most}")
    return captured.replay(_inputs(problem, start))


def _reason_against(problem: Problem) -> str | None:
    if problem.x.device.type != "cuda":
        return f"x is on {problem.x.device}; CUDA graphs are for CUDA devices"
    if torch.cuda.is_current_stream_capturing():
        return "the caller is capturing a graph itself"
    program = problem.classifier.program(problem.x) if len(problem) > 1 else None
    if program is None:
        return "the model is not linearized for this batch"
    # What is computed from parameters alone would be computed outside of the graph.
    return "the model computes its weights" if program.graph.prologue else None


def _inputs(problem: Problem, start: Tensor) -> list[Tensor]:
    target = [] if problem.target is None else [problem.target]
    return [start, problem.x, problem.y, *target]


def _key(attack: Hashable, problem: Problem, model: nn.Module) -> Hashable:
    """Everything that a captured graph has baked in."""
    tensors = (*model.parameters(), *model.buffers())
    fixed = tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors)
    given = tuple((t.shape, t.stride(), t.dtype) for t in _inputs(problem, problem.x))
    autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
    precision = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    return attack, problem.x.device, given, fixed, autocast, precision, torch.are_deterministic_algorithms_enabled()


def _capture(problem: Problem, start: Tensor, loop: Loop) -> _Captured | None:
    logits = problem.logits(problem.x)  # checks them, which cannot be done inside
    inputs = [tensor.clone(memory_format=torch.preserve_format) for tensor in _inputs(problem, start)]
    begin, x, y, *target = inputs
    # Parameters change between replays: nothing that follows from them may be computed once.
    held = problem.classifier.unfrozen()
    inside = replace(problem, classifier=held, x=x, y=y, target=target[0] if target else None)
    try:
        graph, result = record(lambda: loop(inside, begin), problem.x.device)
    except RuntimeError:
        # Something in the loop cannot be captured. What else may be wrong shows when it runs without a graph.
        return None
    return _Captured(graph, inputs, result, logits.shape[1])
