"""The first-call check: the exported program against autograd on the live model, for a few samples.

Export can succeed and still be wrong: a user's `autograd.Function` loses its backward, and a region without
gradients may be inlined. Logits, effective weights and the penalty's parameter gradients are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from emr_kernels.checks import check_logits
from emr_kernels.linearize.program import Program
from emr_kernels.linearize.wrappers import evaluation_mode, exact_attention, ordinary_tensors, plain_kernels, untouched

# Relative error per tensor, and relative to all of them together. Units within rounding of zero may take the other
# branch in another memory format, so these are far above rounding and far below a derivative that is wrong.
_TOLERANCES = {
    torch.float64: (1e-6, 1e-8),
    torch.float32: (1e-2, 1e-4),
    torch.float16: (2e-1, 2e-2),
    torch.bfloat16: (3e-1, 5e-2),
}
# Beyond what rounding can do, in any precision.
_GROSS = (3e-1, 5e-2)


def untouched_forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits of `model` in its present mode; what its forward stores on the model, or writes into x, is lost."""
    with untouched(model):
        logits: torch.Tensor = model(x.clone())
    return logits


@contextmanager
def live_evaluation(model: nn.Module) -> Iterator[None]:
    """Around a forward of the live model that is to be differentiated: evaluation mode, no fused attention."""
    with ordinary_tensors(), torch.enable_grad(), evaluation_mode(model), exact_attention():
        yield


def probe(model: nn.Module, x: torch.Tensor) -> int:
    """C, from an evaluation-mode forward that leaves no trace.

    Raises:
        TypeError, ValueError: if the model cannot process x, or does not return logits `[N, C]`.
    """
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.no_grad(), evaluation_mode(model), torch.random.fork_rng(devices=devices):
        try:
            logits = untouched_forward(model, x)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            message = str(error).strip().splitlines()
            raise ValueError(
                f"x has shape {tuple(x.shape)}, which the model cannot process "
                f"({type(error).__name__}: {message[0] if message else ''}); expected a batch that model(x) accepts"
            ) from error
    check_logits(logits, x.shape[0])
    return logits.shape[1]


def find_mismatch(model: nn.Module, program: Program, x: torch.Tensor) -> str | None:
    """What the program gets wrong on this input; None if it agrees with autograd.

    Args:
        model: the unwrapped module.
        program: with x as its only tap.
        x: `[N, ...]`, a few samples.
    """
    return _settled(_penalty_mismatch, model, program, x)


def gradient_mismatch(model: nn.Module, program: Program, x: torch.Tensor) -> str | None:
    """What the program's ordinary gradient gets wrong on this input, against autograd on the model as it stands.

    Args:
        model: the unwrapped module, in the mode that its training forward runs in.
        program: any taps.
        x: `[N, ...]`, a few samples.
    """
    with torch.inference_mode(False):
        return _settled(_gradient_mismatch, model, program, x)


def _settled(
    check: Callable[[nn.Module, Program, torch.Tensor, tuple[float, float]], str | None],
    model: nn.Module,
    program: Program,
    x: torch.Tensor,
) -> str | None:
    """The verdict of a check; what only rounding can settle in float32 is settled in float64, on a copy of the model.

    In float32 the gradients of a deep network differ by percents from one order of summation to the next, autograd's
    own, too: a unit within rounding of zero is on in one and off in the other, and much hangs on it.
    """
    mismatch = check(model, program, x, _TOLERANCES.get(x.dtype, _TOLERANCES[torch.float32]))
    if mismatch is None or x.dtype != torch.float32 or check(model, program, x, _GROSS) is not None:
        return mismatch
    try:
        return check(copy.deepcopy(model).double(), program, x.double(), _TOLERANCES[torch.float64])
    except Exception:  # a model that cannot be copied, or that runs in float32 only
        return mismatch


def _penalty_mismatch(
    model: nn.Module, program: Program, x: torch.Tensor, tolerance: tuple[float, float]
) -> str | None:
    x = x.detach()
    # A weight that happens to be zero, or frozen, would hide what is wrong with the derivative.
    with torch.enable_grad(), evaluation_mode(model), plain_kernels(x.device.type), _perturbed(model):
        values = program.bind(model, x.shape[0])
        bound = {id(values[binding.index]) for binding in program.graph.bindings}
        leaves = program.leaves(values)
        plan = program.plan(tuple(leaf.requires_grad for leaf in leaves))
        point = program.forward(values, x, plan)
        live_x = x.clone().requires_grad_()
        live_logits = untouched_forward(model, live_x)
        if point.logits.shape != live_logits.shape or _differs([point.logits], [live_logits.detach()], tolerance):
            return "its logits differ from the model's"
        foreign = _foreign_node(live_logits, bound | {id(live_x)})
        if foreign is not None:
            return foreign
        seed = _seed_like(live_logits)
        (weight,), kept = program.vjp(point, seed, keep=True)
        try:
            (live_weight,) = torch.autograd.grad(
                (live_logits * seed).sum(), live_x, create_graph=True, allow_unused=True
            )
        except RuntimeError:
            live_weight = None
        if _differs([weight], [None if live_weight is None else live_weight.detach()], tolerance, [x]):
            return "its input gradient differs from autograd's"
        if weight is None or live_weight is None or not live_weight.requires_grad:
            return None
        grads, _ = program.pull_back(point, kept, [weight], wants_input=False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = _to_parameters(leaves, grads, parameters)
        try:
            expected = torch.autograd.grad(0.5 * live_weight.square().sum(), parameters, allow_unused=True)
        except RuntimeError:
            # No second derivative in the live model: there is nothing to compare with.
            return None
        if _differs(found, expected, tolerance, parameters):
            return "its parameter gradient differs from autograd's double backward"
    return None


def _gradient_mismatch(
    model: nn.Module, program: Program, x: torch.Tensor, tolerance: tuple[float, float]
) -> str | None:
    x = x.detach()
    with torch.enable_grad(), plain_kernels(x.device.type), _perturbed(model):
        values = program.bind(model, x.shape[0])
        leaves = program.leaves(values)
        plan = program.plan(tuple(leaf.requires_grad for leaf in leaves), first_order=True)
        point = program.forward(values, x, plan)
        live_x = x.clone().requires_grad_()
        live_logits = untouched_forward(model, live_x)
        if point.logits.shape != live_logits.shape or _differs([point.logits], [live_logits.detach()], tolerance):
            return "its logits differ from the model's"
        seed = _seed_like(live_logits)
        grads, x_grad = program.gradient(point, seed, wants_input=True)
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = [x_grad, *_to_parameters(leaves, grads, parameters)]
        targets = [live_x, *parameters]
        expected = torch.autograd.grad(live_logits, targets, seed, allow_unused=True)
        return "its gradient differs from autograd's" if _differs(found, expected, tolerance, targets) else None


def _seed_like(logits: torch.Tensor) -> torch.Tensor:
    """A fixed seed that weighs every logit of every sample differently."""
    steps = torch.arange(logits.numel(), device=logits.device, dtype=torch.float32)
    return torch.cos(steps).view(logits.shape).to(logits.dtype)


@contextmanager
def _perturbed(model: nn.Module) -> Iterator[None]:
    """Every floating-point parameter moved a little and requiring grad, for a while; bit for bit as before after."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    before = [(p, p.detach().clone(), p.requires_grad) for p in parameters]
    try:
        for p, value, _ in before:
            wave = torch.cos(torch.arange(p.numel(), device=p.device, dtype=torch.float32)).view(p.shape)
            size = 0.05 * value.float().abs().mean() + 0.01
            p.data.copy_(value + (size * wave).to(p.dtype))
            p.requires_grad_()
        yield
    finally:
        for p, value, requires_grad in before:
            p.data.copy_(value)
            p.requires_grad_(requires_grad)


def _foreign_node(logits: torch.Tensor, known: set[int]) -> str | None:
    """What in the live forward's graph an exported program cannot hold: a custom backward, or an unknown leaf."""
    seen: set[Any] = set()
    stack = [logits.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return f"forward calls an autograd.Function of its own ({type(node).__name__})"
        variable = getattr(node, "variable", None)
        if isinstance(variable, torch.Tensor) and id(variable) not in known:
            return f"forward uses a tensor {tuple(variable.shape)} that is not a parameter of the model"
        stack.extend(parent for parent, _ in node.next_functions)
    return None


def _to_parameters(
    leaves: list[torch.Tensor], grads: list[torch.Tensor | None], parameters: list[nn.Parameter]
) -> list[torch.Tensor | None]:
    """Pull the leaves' gradients back to the parameters (a leaf may be computed from some)."""
    pairs = [(leaf, grad.to(leaf.dtype)) for leaf, grad in zip(leaves, grads, strict=True) if grad is not None]
    if not pairs or not parameters:
        return [None] * len(parameters)
    roots, cotangents = zip(*pairs, strict=True)
    return list(torch.autograd.grad(roots, parameters, cotangents, allow_unused=True))


def _differs(
    found: Iterable[torch.Tensor | None],
    expected: Iterable[torch.Tensor | None],
    tolerance: tuple[float, float],
    like: Iterable[torch.Tensor] | None = None,
) -> bool:
    pairs = []
    for a, b, shape in zip(found, expected, like or found, strict=True):
        if a is None and b is None:
            continue
        zero = torch.zeros_like(shape if shape is not None else b)  # type: ignore[arg-type]
        pairs.append(((zero if a is None else a).detach(), (zero if b is None else b).detach()))
    if not pairs:
        return False
    relative, overall = tolerance
    wide = [(a.double(), b.double()) for a, b in pairs]
    total = sum(float(b.square().sum()) for _, b in wide) ** 0.5
    return any(not float((a - b).norm()) <= relative * float(b.norm()) + overall * total for a, b in wide)
