"""Whether a model computes the same function in its present mode as in evaluation mode.

Then one forward serves the training loss and the penalty. BatchNorm and dropout in training mode say no at once;
otherwise the model is exported as it stands, and its graph compared with the evaluation-mode one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from emr_kernels.linearize.export import UnsupportedModelError, export_graph
from emr_kernels.linearize.graph import Graph, Node
from emr_kernels.linearize.program import Program
from emr_kernels.linearize.verify import gradient_mismatch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
_DROPOUTS = (torch.ops.aten.dropout.default, torch.ops.aten.feature_dropout.default)


def hooked(model: nn.Module) -> bool:
    """Whether the live forward runs hooks, which a program does not."""
    return any(getattr(global_hooks, name) for name in _GLOBAL_HOOKS) or any(
        getattr(module, name) for module in model.modules() for name in _HOOKS
    )


def modes(model: nn.Module) -> tuple[bool, ...]:
    """The training flag of every module."""
    return tuple(module.training for module in model.modules())


def difference(model: nn.Module, program: Program, x: torch.Tensor) -> str | None:
    """Why the model in its present mode is another function than the program; None if it is the same.

    Args:
        model: the unwrapped module.
        program: exported in evaluation mode.
        x: `[N, ...]`.
    """
    present = program.graph
    if any(modes(model)):
        for name, module in model.named_modules():
            if module.training and isinstance(module, _NormBase) and module.track_running_stats:
                return f"{name or 'the model'} ({type(module).__name__}) is in training mode"
            if module.training and isinstance(module, _DropoutNd) and module.p > 0:
                return f"{name or 'the model'} ({type(module).__name__}) is in training mode"
        try:
            present = export_graph(model, x, evaluation=False)
        except UnsupportedModelError as error:
            return f"in its present mode: {error}"
        if not _same(present, program.graph):
            return "its forward depends on the training mode"
    for buffer in (*program.graph.written, *present.written):
        return f"its forward changes the buffer {buffer}"
    samples = x[:2] if program.graph.serves(2) else x
    try:
        return gradient_mismatch(model, program, samples)
    except Exception as error:  # an operator that runs in the model need not run on its own
        return f"running its backward raised {type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _same(a: Graph, b: Graph) -> bool:
    """Whether two exports are one function of x, the parameters and the buffers."""
    if (a.input, a.output, a.leaves) != (b.input, b.output, b.leaves):
        return False
    if [(v.index, v.name) for v in a.bindings] != [(v.index, v.name) for v in b.bindings]:
        return False
    return _calls(a) == _calls(b)


def _calls(graph: Graph) -> list[Any]:
    return [(node.index, node.target, _arguments(node)) for node in (*graph.prologue, *graph.body)]


def _arguments(node: Node) -> tuple[Any, ...]:
    """Dropout with probability zero is the identity in every mode."""
    if node.target in _DROPOUTS and node.args[1] == 0:
        return (*node.args[:2], False)
    return node.args
