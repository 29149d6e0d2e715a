"""The passes of the engine over one exported graph.

With s = Σ_i seed_i · f(x_i), h_l the value of a tap (the input x, or the input of a layer) and δ the cotangents:

    forward     x -> logits, and a residual for each call
    vjp         seed -> ∂s/∂h_l at every tap
    pull_back   tangents u_l at the taps -> ∂/∂θ and ∂/∂x of Σ_l ⟨u_l, ∂s/∂h_l⟩, the u_l and the seed held constant
    gradient    seed -> ∂s/∂θ and ∂s/∂x, the ordinary backward

`pull_back` walks forward once (tangents, parameter gradients) and, only where a curved operator left something to
carry, backward once (`adjoint`). There is no double backward in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from emr_kernels.linearize.folding import linear_residual, unfolded
from emr_kernels.linearize.fusion import fuse
from emr_kernels.linearize.graph import Graph, resolve
from emr_kernels.linearize.plan import Plan, Planner
from emr_kernels.linearize.point import Point
from emr_kernels.linearize.rules import GenericRule, Rule
from emr_kernels.linearize.values import add, cast, dtype_of, look_up
from emr_kernels.linearize.wrappers import ordinary, ordinary_tensors

#: (logits, their tangent) -> the derivative of ⟨seed, tangent⟩ in the logits.
SeedDerivative = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Program:
    """One graph, with its rules; stateless (but for `frozen` copies), so that one program serves many calls at once.

    Args:
        graph: the exported forward.
        taps: values at which cotangents are taken and tangents put in; `graph.input` for x itself.
        fixed: whether nobody asks for gradients in parameters.
    """

    def __init__(self, graph: Graph, taps: Sequence[int], fixed: bool = False) -> None:
        self.graph = graph
        self.taps = tuple(taps)
        self.rules: list[Rule] = fuse(graph, {*taps, graph.output}, fixed)
        self.is_active = [bool(rule.node.active or rule.node.weights) for rule in self.rules]
        self.planner = Planner(graph, self.rules, self.taps)
        self._paths = [(binding, binding.name.split(".")) for binding in graph.bindings]
        self.image_like = any("conv2d" in str(rule.node.target) for rule in self.rules)
        self._to_freeze: set[int] = set()
        self._fixed: Program | None = None

    def frozen(self) -> Program:
        """A program for `forward`, `vjp` and `jvp` while the model's parameters and buffers stay as they are.

        What follows from them alone (BatchNorm's map, weights in the layout of the convolution library) is computed at
        the first forward and kept.
        """
        if self._fixed is None:
            self._fixed = Program(self.graph, self.taps, fixed=True)
        program = copy.copy(self._fixed)
        program.rules = list(program.rules)
        program._to_freeze = set(range(len(program.rules)))
        return program

    def plan(self, wanted: tuple[bool, ...], first_order: bool = False, moving: bool = False) -> Plan:
        """The plan for these wanted leaves (parallel to `graph.leaves`).

        `first_order` if `gradient` will be called, `moving` if `pull_back` will be given a seed's derivative.
        """
        return self.planner.plan(wanted, first_order, moving)

    def bind(self, model: nn.Module, batch: int) -> list[Any]:
        """Values of everything that does not depend on the data of x, from the live model.

        Runs under the caller's grad mode, so that a tensor computed from parameters alone (weight_norm) pulls its
        gradient back to them.
        """
        values: list[Any] = [None] * self.graph.size
        for binding, path in self._paths:
            values[binding.index] = look_up(model, binding, path)
        for index, extent in self.graph.extents.items():
            values[index] = extent(batch)
        with ordinary_tensors():
            for node in self.graph.prologue:
                values[node.index] = node.call(*resolve(node.args, values))
        return values

    def leaves(self, values: list[Any]) -> list[torch.Tensor]:
        """The tensors, among those of `bind`, that gradients are taken for."""
        return [values[leaf] for leaf in self.graph.leaves]

    def forward(self, values: list[Any], x: torch.Tensor, plan: Plan) -> Point:
        """Run the classifier and keep what its derivatives need.

        Args:
            values: from `bind`; used up by the call.
            x: `[N, ...]`.
            plan: which leaves' gradients will be asked for.
        """
        graph = self.graph
        point = Point(plan, graph.size, len(self.rules))
        point.device_type = device = x.device.type
        enabled, low = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        point.dtypes[graph.input] = x.dtype
        with ordinary_tensors(), torch.no_grad(), torch.autocast(device, enabled=False):
            values[graph.input] = self._laid_out(ordinary(x).detach())
            for place, rule in enumerate(self.rules):
                node = rule.node
                args = resolve(node.args, values)
                if enabled and (rule.matmul or rule.full_precision):
                    operands = low if rule.matmul else torch.float32
                    args = tuple(cast(arg, operands) for arg in args)
                    point.operand_dtypes[place] = operands
                if place in self._to_freeze:
                    self._to_freeze.discard(place)
                    rule = self.rules[place] = rule.frozen(args)
                if not self.is_active[place] or isinstance(rule, GenericRule):
                    with torch.autocast(device, dtype=low, enabled=enabled):
                        if self.is_active[place]:
                            output, point.residuals[place] = rule.forward(args, plan.needs_primal[place])
                        else:
                            output = node.call(*args)
                else:
                    output, point.residuals[place] = rule.forward(args, plan.needs_primal[place])
                values[node.index] = output
                point.dtypes[node.index] = dtype_of(output)
                for ref in self.planner.releases[place]:
                    values[ref] = None
        point.logits = values[graph.output]
        return point

    def _laid_out(self, x: torch.Tensor) -> torch.Tensor:
        """x in the memory format that the convolution library is fastest in."""
        fast = x.device.type == "cpu" and x.dtype is not torch.float64
        if self.image_like and x.dim() == 4 and fast:
            x = x.contiguous(memory_format=torch.channels_last)
            # One channel is in either order: strides that say so make the first convolution keep it.
            return x.view(x.shape[0], *x.shape[2:], 1).permute(0, 3, 1, 2) if x.shape[1] == 1 else x
        return x

    def vjp(self, point: Point, seed: torch.Tensor, keep: bool) -> tuple[list[torch.Tensor | None], list[Any]]:
        """∂(Σ seed · logits)/∂(tap) for every tap.

        Args:
            seed: `[N, C]`.
            keep: whether the cotangents that `pull_back` needs are kept.

        Returns:
            The cotangents of the taps (None where the logits do not depend on one), and the kept ones by call.
        """
        plan = point.plan
        kept: list[Any] = [None] * len(self.rules)
        cotangents: list[Any] = [None] * self.graph.size
        at_taps: dict[int, torch.Tensor] = {}
        owned: set[int] = set()  # values whose cotangent is memory that nobody else reads
        with ordinary_tensors(), torch.no_grad(), torch.autocast(point.device_type, enabled=False):
            cotangents[self.graph.output] = ordinary(seed).to(point.logits.dtype)
            for place in range(len(self.rules) - 1, -1, -1):
                rule = self.rules[place]
                index = rule.node.index
                cotangent = cotangents[index]
                if cotangent is None or index not in self.planner.tapped:
                    continue
                cotangents[index] = None
                if index in self.taps:
                    at_taps[index] = cotangent
                stays = keep and plan.keeps_cotangent[place]
                if stays:
                    kept[place] = cotangent
                if not any(ref in self.planner.tapped for ref in rule.node.active):
                    continue
                free = index in owned and not stays and index not in self.taps
                residual = linear_residual(self.rules, self.planner, point, place)
                if len(rule.node.active) == 1 and isinstance(cotangents[rule.node.active[0]], torch.Tensor):
                    (ref,) = rule.node.active
                    total = rule.vjp_onto(residual, cotangent, cotangents[ref], free)
                    if total is not None:
                        cotangents[ref] = total
                        owned.add(ref)
                        continue
                grads = (rule.vjp_into if free else rule.vjp)(residual, cotangent)
                for ref, grad in zip(rule.node.active, grads, strict=True):
                    if grad is not None and ref in self.planner.tapped:
                        if rule.fresh or cotangents[ref] is not None:
                            owned.add(ref)
                        cotangents[ref] = add(cotangents[ref], grad, point.dtypes[ref], rule.fresh)
        if self.graph.input in self.taps and cotangents[self.graph.input] is not None:
            at_taps[self.graph.input] = cotangents[self.graph.input]
        return [at_taps.get(tap) for tap in self.taps], kept

    def jvp(self, point: Point, tangents: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """The logits' tangent for these tangents of the taps; None for zero."""
        with ordinary_tensors(), torch.no_grad(), torch.autocast(point.device_type, enabled=False):
            flow = self._injected(point, tangents)
            for place, rule in enumerate(self.rules):
                given = self._operands(point, place, flow)
                if any(t is not None for t in given):
                    out = rule.jvp(linear_residual(self.rules, self.planner, point, place), given)
                    index = rule.node.index
                    if out is None:
                        continue
                    flow[index] = add(flow[index], out, point.dtypes[index], False)
        return flow[self.graph.output]

    def _injected(self, point: Point, tangents: Sequence[torch.Tensor | None]) -> list[Any]:
        flow: list[Any] = [None] * self.graph.size
        for tap, tangent in zip(self.taps, tangents, strict=True):
            if tangent is not None:
                laid_out = self._laid_out(ordinary(tangent)) if tap == self.graph.input else ordinary(tangent)
                # Two names may stand for one value.
                flow[tap] = add(flow[tap], laid_out, point.dtypes[tap], False)
        return flow

    def _operands(self, point: Point, place: int, flow: list[Any]) -> tuple[Any, ...]:
        tangents = tuple(flow[ref] for ref in self.rules[place].node.active)
        dtype = point.operand_dtypes[place]
        return tangents if dtype is None else tuple(cast(t, dtype) for t in tangents)

    def pull_back(
        self,
        point: Point,
        kept: list[Any],
        tangents: Sequence[torch.Tensor | None],
        wants_input: bool,
        seed_derivative: SeedDerivative | None = None,
    ) -> tuple[list[torch.Tensor | None], torch.Tensor | None]:
        """Derivatives of Σ_tap ⟨tangent, ∂s/∂tap⟩ with tangents held constant, and the seed, too, unless it moves.

        Args:
            kept: the cotangents from `vjp(..., keep=True)`; each is let go of as soon as it is used.
            tangents: one for each tap.
            wants_input: whether the derivative in x is asked for.
            seed_derivative: of a seed that depends on the logits: from the logits and their tangent, the derivative of
                ⟨seed, tangent⟩ in the logits, `[N, C]`.

        Returns:
            A gradient for each of `graph.leaves` (None where it is zero or not wanted), and one for x.
        """
        plan = point.plan
        grads: list[torch.Tensor | None] = [None] * len(self.graph.leaves)
        flow = self._injected(point, tangents)
        adjoints: list[Any] = [None] * self.graph.size
        with ordinary_tensors(), torch.no_grad(), torch.autocast(point.device_type, enabled=False):
            for place, rule in enumerate(self.rules):
                node = rule.node
                given = self._operands(point, place, flow)
                cotangent, kept[place] = kept[place], None
                moving = any(t is not None for t in given)
                if moving and place in plan.pulled_again:
                    cotangent = self._pulled_again(point, place, kept)
                if moving and cotangent is not None:
                    residual = linear_residual(self.rules, self.planner, point, place)
                    wanted, onwards = plan.wanted[place], plan.needs_tangent[place]
                    result = rule.second_order(residual, cotangent, given, wanted, onwards)
                    out = result.tangent
                    scaled = unfolded(self.rules, self.planner, point, place, result.param_grads)
                    self._collect(grads, place, scaled.layer)
                    for leaf, grad in scaled.norms:
                        self._add_to(grads, leaf, grad)
                    for ref, term in zip(node.active, result.adjoint, strict=True):
                        if term is not None:
                            adjoints[ref] = add(adjoints[ref], term, point.dtypes[ref], False)
                elif moving and plan.needs_tangent[place]:
                    out = rule.jvp(linear_residual(self.rules, self.planner, point, place), given)
                else:
                    out = None
                if out is not None:
                    flow[node.index] = add(flow[node.index], out, point.dtypes[node.index], False)
                for ref in self.planner.releases[place]:
                    flow[ref] = None
            output = self.graph.output
            if seed_derivative is not None and flow[output] is not None:
                bend = seed_derivative(point.logits, flow[output])
                adjoints[output] = add(adjoints[output], bend, point.dtypes[output], False)
            del flow
            if any(a is not None for a in adjoints):
                self._carry_back(point, adjoints, grads, wants_input)
        return grads, adjoints[self.graph.input]

    def gradient(
        self, point: Point, seed: torch.Tensor, wants_input: bool
    ) -> tuple[list[torch.Tensor | None], torch.Tensor | None]:
        """Derivatives of Σ seed · logits, the seed held constant, at a point whose plan is of first order.

        Args:
            seed: `[N, C]`.
            wants_input: whether the derivative in x is asked for.

        Returns:
            A gradient for each of `graph.leaves` (None where it is zero or not wanted), and one for x.
        """
        grads: list[torch.Tensor | None] = [None] * len(self.graph.leaves)
        adjoints: list[Any] = [None] * self.graph.size
        with ordinary_tensors(), torch.no_grad(), torch.autocast(point.device_type, enabled=False):
            adjoints[self.graph.output] = ordinary(seed).to(point.dtypes[self.graph.output])
            self._carry_back(point, adjoints, grads, wants_input)
        return grads, adjoints[self.graph.input]

    def _carry_back(
        self, point: Point, adjoints: list[Any], grads: list[torch.Tensor | None], wants_input: bool
    ) -> None:
        """An ordinary backward pass for what the curved operators left."""
        owned: set[int] = set()  # values whose adjoint is memory that nobody else reads
        for place in range(len(self.rules) - 1, -1, -1):
            rule = self.rules[place]
            index = rule.node.index
            adjoint, adjoints[index] = adjoints[index], None
            if adjoint is None:
                continue
            wanted = point.plan.wanted[place]
            needs_input = bool(rule.node.active) and (wants_input or place > point.plan.first_wanted)
            residual = self._with_input(point, place) if any(wanted) else point.residuals[place]
            found, terms = rule.backward(residual, adjoint, wanted, needs_input, index in owned)
            del residual
            self._collect(grads, place, found)
            for ref, term in zip(rule.node.active, terms, strict=True):
                if term is not None:
                    if rule.fresh or adjoints[ref] is not None:
                        owned.add(ref)
                    adjoints[ref] = add(adjoints[ref], term, point.dtypes[ref], rule.fresh)

    def _pulled_again(self, point: Point, place: int, kept: list[Any]) -> torch.Tensor | None:
        """The cotangent of a layer that a light call alone reads."""
        reader = point.plan.pulled_again[place]
        if kept[reader] is None:
            return None
        residual = linear_residual(self.rules, self.planner, point, reader)
        (cotangent,) = self.rules[reader].vjp(residual, kept[reader])
        assert cotangent is not None
        return cotangent.to(point.dtypes[self.rules[place].node.index])

    def _with_input(self, point: Point, place: int) -> Any:
        """A call's residual, with its input made once more where that was not kept."""
        residual, maker = point.residuals[place], point.plan.remade.get(place)
        if maker is None:
            return residual
        input, dtype = self.rules[maker].remake(point.residuals[maker]), point.operand_dtypes[place]
        return residual._replace(input=input if dtype is None else cast(input, dtype))

    @staticmethod
    def _add_to(grads: list[torch.Tensor | None], leaf: int, grad: torch.Tensor) -> None:
        held = grads[leaf]
        grads[leaf] = grad if held is None else held + grad

    def _collect(self, grads: list[torch.Tensor | None], place: int, found: Sequence[torch.Tensor | None]) -> None:
        for ref, grad in zip(self.rules[place].node.weights, found, strict=True):
            if grad is not None:
                self._add_to(grads, self.planner.leaf_place[ref], grad)
