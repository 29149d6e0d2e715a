"""What is known about a program before it runs: lifetimes, which memory may be reused, who has to do what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from emr_kernels.linearize.graph import Graph
from emr_kernels.linearize.rules import Rule
from emr_kernels.linearize.rules.convolution import BilinearRule
from emr_kernels.linearize.rules.normalization import AffineReluRule
from emr_kernels.linearize.scales import find_scale_sources


@dataclass(frozen=True)
class Plan:
    """What each call has to do, given which leaves' gradients are wanted. Lists run parallel to the calls."""

    wanted: list[tuple[bool, ...]]
    needs_primal: list[bool]
    keeps_cotangent: list[bool]
    needs_tangent: list[bool]
    first_wanted: int
    folded: dict[int, int]  # BatchNorm's place -> its scale's place among the leaves; see `scales`
    folding: dict[int, list[int]]  # a layer's place -> the BatchNorms whose scales it applies
    remade: dict[int, int]  # a layer's place -> the place of the light call that makes its input again
    pulled_again: dict[int, int]  # a layer's place -> the place of the light call whose vjp is its cotangent


class Planner:
    """Analyses one program's calls.

    Attributes:
        releases: for each call, the values that nothing reads after it.
        tapped: values that a tangent can reach.
        leaf_place: place among `graph.leaves` by value.
        scale_sources: see `scales`, by BatchNorm's place.
    """

    def __init__(self, graph: Graph, rules: list[Rule], taps: Sequence[int]) -> None:
        self.graph = graph
        self.rules = rules
        kept = {*taps, graph.output}
        dims = {index: len(shape) for index, shape in graph.shapes.items()}
        self.leaf_place = {leaf: place for place, leaf in enumerate(graph.leaves)}
        self.releases = self._last_uses()
        self._makers = {rule.node.index: place for place, rule in enumerate(rules)}
        self._readers = self._find_readers()
        self._kept = kept
        self.tapped = self._downstream_of(taps)
        self.scale_sources = find_scale_sources(rules, kept, dims)
        self._mark_free({*kept, graph.input})
        self._mark_compared()
        self._plans: dict[tuple[tuple[bool, ...], bool, bool], Plan] = {}

    def plan(self, wanted: tuple[bool, ...], first_order: bool, moving: bool) -> Plan:
        """The plan for these wanted leaves (parallel to `graph.leaves`).

        `first_order`: whether the logits' own gradient will be asked for, too, as in ordinary training.
        `moving`: whether the seed depends on the logits, so that their tangent has to be known.
        """
        key = (wanted, first_order, moving)
        if key not in self._plans:
            self._plans[key] = self._make_plan(*key)
        return self._plans[key]

    def _find_readers(self) -> dict[int, list[int]]:
        """The places of the calls that read each value."""
        readers: dict[int, list[int]] = {}
        for place, rule in enumerate(self.rules):
            for ref in rule.node.refs():
                readers.setdefault(ref, []).append(place)
        return readers

    def _last_uses(self) -> list[list[int]]:
        """For each call, the values that nothing reads after it."""
        last: dict[int, int] = {}
        for place, rule in enumerate(self.rules):
            for ref in rule.node.refs():
                last[ref] = place
        fixed = {binding.index for binding in self.graph.bindings} | {self.graph.output}
        releases: list[list[int]] = [[] for _ in self.rules]
        for ref, place in last.items():
            if ref not in fixed:
                releases[place].append(ref)
        return releases

    def _mark_free(self, kept: set[int]) -> None:
        """Tell each rule which of its activations are new memory that it alone reads."""
        uses = Counter(ref for rule in self.rules for ref in rule.node.refs())
        fresh = {rule.node.index for rule in self.rules if rule.fresh} - kept
        for rule in self.rules:
            rule.free = tuple(ref in fresh and uses[ref] == 1 for ref in rule.node.active)

    def _mark_compared(self) -> None:
        """Tell each rule whether a call downstream compares activations."""
        compared: set[int] = set()
        for rule in reversed(self.rules):
            rule.compared = rule.node.index in compared
            if rule.compares or rule.compared:
                compared.update(rule.node.active)

    def _downstream_of(self, taps: Sequence[int]) -> set[int]:
        tapped = set(taps)
        for rule in self.rules:
            if any(ref in tapped for ref in rule.node.active):
                tapped.add(rule.node.index)
        return tapped

    def _make_plan(self, wanted: tuple[bool, ...], first_order: bool, moving: bool) -> Plan:
        masks = [tuple(wanted[self.leaf_place[ref]] for ref in rule.node.weights) for rule in self.rules]
        anything = any(wanted)
        bends: set[int] = set()  # values with a curved call downstream
        carries: set[int] = {self.graph.output} if moving else set()  # values whose tangent is read
        needs_primal, keeps, tangent = [], [], []
        for rule, mask in zip(reversed(self.rules), reversed(masks), strict=True):
            index = rule.node.index
            active = any(ref in self.tapped for ref in rule.node.active)
            keeps.append(active and (rule.curved or (rule.bilinear and any(mask))))
            needs_primal.append((first_order or moving or index in bends) and any(mask))
            tangent.append(index in carries)
            if (rule.curved and active) or index in bends:
                bends.update(rule.node.active)
            if keeps[-1] or index in carries:
                carries.update(rule.node.active)
        if not anything and not bends:
            keeps = [False] * len(keeps)
        first = next((place for place, mask in enumerate(masks) if any(mask)), len(masks))
        folded, folding = self._folds(masks)
        keeps = [kept and place not in folded for place, kept in enumerate(reversed(keeps))]
        needs_primal = needs_primal[::-1]
        remade, again = self._remade(needs_primal), self._pulled_again(keeps)
        needs_primal = [needs and place not in remade for place, needs in enumerate(needs_primal)]
        keeps = [kept and place not in again for place, kept in enumerate(keeps)]
        return Plan(masks, needs_primal, keeps, tangent[::-1], first, folded, folding, remade, again)

    def _remade(self, needs_primal: list[bool]) -> dict[int, int]:
        """The layers whose input need not be kept: a light call makes it, and only layers read it."""
        found: dict[int, int] = {}
        for place, needed in enumerate(needs_primal):
            rule = self.rules[place]
            if not needed or not isinstance(rule, BilinearRule):
                continue
            (value,) = rule.node.active
            maker = self._makers.get(value)
            if maker is None or not self.rules[maker].light or value in self._kept:
                continue
            readers = [self.rules[reader] for reader in self._readers[value]]
            if all(isinstance(reader, BilinearRule) and reader.node.active == (value,) for reader in readers):
                found[place] = maker
        return found

    def _pulled_again(self, keeps: list[bool]) -> dict[int, int]:
        """The layers whose cotangent need not be kept: a light call, whose own is kept, alone reads their output."""
        found: dict[int, int] = {}
        for place, kept in enumerate(keeps):
            rule = self.rules[place]
            value = rule.node.index
            readers = self._readers.get(value, [])
            if not kept or not isinstance(rule, BilinearRule) or len(readers) != 1 or value in self._kept:
                continue
            (reader,) = readers
            if self.rules[reader].light and keeps[reader] and self.rules[reader].node.active == (value,):
                found[place] = reader
        return found

    def _folds(self, masks: list[tuple[bool, ...]]) -> tuple[dict[int, int], dict[int, list[int]]]:
        """Which wanted BatchNorm scales are folded into layers whose weights are wanted, too."""
        folded: dict[int, int] = {}
        folding: dict[int, list[int]] = {}
        for place, source in self.scale_sources.items():
            norm = self.rules[place]
            assert isinstance(norm, AffineReluRule)
            if norm.scale_place is None or not masks[place][norm.scale_place]:
                continue
            served = [(layer, self.rules[layer]) for layer in source.layers]
            if all(
                isinstance(rule, BilinearRule) and rule.weight_place is not None and masks[layer][rule.weight_place]
                for layer, rule in served
            ):
                folded[place] = self.leaf_place[norm.node.weights[norm.scale_place]]
                for layer in source.layers:
                    folding.setdefault(layer, []).append(place)
        return folded, folding
