"""What a rule is, and the table of rules.

With z = F(a, θ) for one operator call, J its Jacobian in the activations a, δ the cotangent of z in the vjp pass and
u the tangent of a in the jvp pass, a rule answers:

    forward        z, and a residual: whatever the other verbs need
    vjp            δ -> Jᵀδ
    jvp            u -> Ju
    param_grads    ∂⟨δ, J(a, θ) u⟩/∂θ
    adjoint        ∂⟨δ, J(a, θ) u⟩/∂a, for operators whose J depends on a (`curved`)
    param_vjp      ā -> (∂F/∂θ)ᵀ ā, needed only upstream of a curved operator
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

from emr_kernels.linearize.graph import Node

Tensors = tuple[torch.Tensor | None, ...]


class SecondOrder(NamedTuple):
    """What one call contributes to the jvp pass: its tangent, and the derivatives of ⟨δ, J u⟩."""

    tangent: Any
    param_grads: Tensors
    adjoint: Tensors


class Rule:
    """The derivative of one operator call.

    A tuple over activations has one entry for each of `node.active`, a tuple over parameters one for each of
    `node.weights`; None stands for zero. At least one tangent given to a verb is not None.
    """

    curved: ClassVar[bool] = False
    """Whether J depends on the activations."""
    bilinear: ClassVar[bool] = False
    """Whether J depends on the parameters, so that `param_grads` needs the cotangent."""
    matmul: ClassVar[bool] = False
    """Whether autocast runs the operator in its low-precision dtype."""
    full_precision: bool = False
    """Whether autocast runs the operator in float32."""
    fresh: ClassVar[bool] = False
    """Whether `forward`, `vjp` and `jvp` return memory of their own, that others may write into."""

    compares: ClassVar[bool] = False
    """Whether the derivative depends on which activations are larger than others: equal ones have to stay equal."""
    light: ClassVar[bool] = False
    """Whether forward and vjp cost little beside a layer: they are done again rather than their results kept."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.free: tuple[bool, ...] = (False,) * len(node.active)
        """For each activation, whether `forward` and `jvp` may overwrite it: nobody else reads it."""
        self.compared = False
        """Whether a call downstream compares."""

    @classmethod
    def accepts(cls, node: Node) -> bool:
        """Whether this rule can serve the call; if not, the generic rule does."""
        return len(node.active) == 1 and not node.weights

    def frozen(self, args: tuple[Any, ...]) -> Rule:
        """The rule to use while parameters and buffers keep the values they have in these arguments of `forward`."""
        return self

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        """The output and the residual; `primal` asks for what `param_vjp` needs, too."""
        raise NotImplementedError

    def remake(self, residual: Any) -> torch.Tensor:
        """The output once more, of a light call."""
        raise NotImplementedError

    def vjp(self, residual: Any, cotangent: Any) -> Tensors:
        """Jᵀδ for each activation."""
        raise NotImplementedError

    def vjp_into(self, residual: Any, cotangent: Any) -> Tensors:
        """The same as `vjp`, and may overwrite the cotangent."""
        return self.vjp(residual, cotangent)

    def vjp_onto(self, residual: Any, cotangent: Any, held: torch.Tensor, free: bool) -> torch.Tensor | None:
        """Jᵀδ + held for the only activation in one pass; None where there is no such pass.

        `free`: the cotangent may be overwritten; `held` never is.
        """
        return None

    def jvp(self, residual: Any, tangents: Tensors) -> Any:
        """Ju."""
        raise NotImplementedError

    def param_grads(self, residual: Any, cotangent: Any, tangents: Tensors, wanted: Sequence[bool]) -> Tensors:
        """∂⟨δ, J u⟩/∂θ for each wanted parameter."""
        return (None,) * len(wanted)

    def adjoint(self, residual: Any, cotangent: Any, tangents: Tensors) -> Tensors:
        """∂⟨δ, J u⟩/∂a for each activation."""
        return (None,) * len(self.node.active)

    def param_vjp(self, residual: Any, cotangent: Any, wanted: Sequence[bool]) -> Tensors:
        """(∂F/∂θ)ᵀā for each wanted parameter."""
        return (None,) * len(wanted)

    def backward(
        self, residual: Any, cotangent: Any, wanted: Sequence[bool], needs_input: bool, free: bool
    ) -> tuple[Tensors, Tensors]:
        """Everything an ordinary backward pass asks of one call: `param_vjp`, and `vjp` if the input's is needed.

        `free`: the cotangent may be overwritten.
        """
        grads = self.param_vjp(residual, cotangent, wanted) if any(wanted) else (None,) * len(wanted)
        if not needs_input:
            return grads, (None,) * len(self.node.active)
        return grads, (self.vjp_into if free else self.vjp)(residual, cotangent)

    def second_order(
        self, residual: Any, cotangent: Any, tangents: Tensors, wanted: Sequence[bool], needs_tangent: bool
    ) -> SecondOrder:
        """Everything the jvp pass asks of one call."""
        grads = self.param_grads(residual, cotangent, tangents, wanted) if any(wanted) else (None,) * len(wanted)
        adjoint = self.adjoint(residual, cotangent, tangents) if self.curved else (None,) * len(tangents)
        return SecondOrder(self.jvp(residual, tangents) if needs_tangent else None, grads, adjoint)


_TABLE: dict[Callable[..., Any], list[type[Rule]]] = {}
RuleType = TypeVar("RuleType", bound=type[Rule])


def rule_for(*targets: Callable[..., Any]) -> Callable[[RuleType], RuleType]:
    """Class decorator: this rule serves these operators."""

    def register(rule: RuleType) -> RuleType:
        for target in targets:
            _TABLE.setdefault(target, []).append(rule)
        return rule

    return register


def lookup(node: Node) -> type[Rule] | None:
    """The first registered rule that accepts the call."""
    if node.is_complex and node.target is not operator.getitem:
        return None
    return next((rule for rule in _TABLE.get(node.target, ()) if rule.accepts(node)), None)


def sum_to(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Undo broadcasting: sum `tensor` to `shape`."""
    return tensor if tensor.shape == torch.Size(shape) else tensor.sum_to_size(shape)


def reusable(tensor: torch.Tensor, memory_format: torch.memory_format, allowed: bool) -> torch.Tensor | None:
    """The tensor as the place for a result of its shape in this memory format, if that is allowed and fits."""
    return tensor if allowed and tensor.is_contiguous(memory_format=memory_format) else None
