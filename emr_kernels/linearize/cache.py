"""One export for each model and input shape, kept as long as the model lives and stays what it was."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from emr_kernels.linearize.export import UnsupportedModelError, export_graph
from emr_kernels.linearize.graph import Graph
from emr_kernels.linearize.program import Program
from emr_kernels.linearize.verify import find_mismatch

INPUT = "input"


@dataclass
class _Prepared:
    """A graph that passed the first-call check, or the reason why there is none."""

    graph: Graph | None
    reason: str = ""
    batches: tuple[int, int] = (1, 1)
    programs: dict[tuple[str, ...], Program] = field(default_factory=dict)

    def serves(self, batch: int) -> bool:
        return self.batches[0] <= batch <= self.batches[1]


@dataclass
class _Entry:
    fingerprint: Any
    prepared: dict[Any, list[_Prepared]] = field(default_factory=dict)


_ENTRIES: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()


def fingerprint(model: nn.Module) -> Any:
    """What a change of structure shows in: the module tree, and every tensor's identity, shape, dtype and device.

    Changed values (an optimizer step, `load_state_dict`) leave it as it is.
    """
    modules = tuple((name, type(module)) for name, module in model.named_modules(remove_duplicate=False))
    tensors: list[Any] = []
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is not None:
                    # A buffer may be rebound at every forward; a parameter that changes places may change ties.
                    identity = id(tensor) if group is module._parameters else None
                    tensors.append((name, identity, tensor.shape, tensor.dtype, tensor.device))
    return modules, tuple(tensors)


def find_program(model: nn.Module, x: torch.Tensor, layers: tuple[str, ...] = (INPUT,)) -> Program:
    """The checked program for this model and this kind of input, exported now if there is none yet.

    Args:
        model: the unwrapped module.
        x: `[N, ...]`.
        layers: where cotangents are wanted: "input", or names of modules (their input).

    Raises:
        UnsupportedModelError: if the engine cannot serve the model; the message says why.
        ValueError: if a layer does not name a module with one differentiable input.
    """
    present = fingerprint(model)
    entry = _ENTRIES.get(model)
    if entry is None or entry.fingerprint != present:
        entry = _ENTRIES[model] = _Entry(present)
    kind = (x.shape[1:], x.dtype, x.device)
    known = entry.prepared.setdefault(kind, [])
    batch = x.shape[0]
    prepared = next((p for p in known if p.serves(batch)), None)
    if prepared is None:
        prepared = _prepare(model, x)
        known.append(prepared)
    if prepared.graph is None:
        raise UnsupportedModelError(prepared.reason)
    if layers not in prepared.programs:
        graph = prepared.graph
        taps = [graph.input if layer == INPUT else graph.input_of(layer) for layer in layers]
        prepared.programs[layers] = Program(graph, taps)
    return prepared.programs[layers]


def forget(model: nn.Module) -> None:
    """Drop what is kept for the model, so that the next call exports it again."""
    _ENTRIES.pop(model, None)


def _prepare(model: nn.Module, x: torch.Tensor) -> _Prepared:
    batch = x.shape[0]
    try:
        graph = export_graph(model, x)
    except UnsupportedModelError as error:
        return _Prepared(None, str(error), (1, 1) if batch == 1 else (2, 2**62))
    program = Program(graph, [graph.input])
    few = x[:2] if graph.serves(2) else x
    mismatch = find_mismatch(model, program, few)
    if mismatch is not None:
        return _Prepared(None, f"the exported program is not exact: {mismatch}", graph.batches)
    return _Prepared(graph, "", graph.batches, {(INPUT,): program})
