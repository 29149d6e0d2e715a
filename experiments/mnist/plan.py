"""Which models each part trains, and what it measures of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from emr_training.selection import Candidate, choose
from experiments.jobs import Job, read
from experiments.mnist import measure
from experiments.mnist.diagnosis import diagnosis
from experiments.mnist.settings import Settings
from experiments.mnist.spec import EMR, Spec, at_equal_cost

#: A net and how it is trained: standard, or an attack's defense and radius.
Base = tuple[str, str, float]
Choices = Mapping[Base, EMR]


@dataclass(frozen=True)
class Setting(Candidate):
    """A candidate of the sweep, which may be centred."""

    center: bool = False

    @property
    def emr(self) -> EMR:
        """The penalty's setting."""
        return EMR(self.strength, self.temperature, self.center)


class Plan:
    """The experiment's models and jobs, below the folder `output`."""

    def __init__(self, output: Path, settings: Settings) -> None:
        self.output, self.settings = output, settings

    def sweep_bases(self) -> list[Base]:
        """What has a sweep of its own: all but TRADES, net by net."""
        given = self.settings
        adversarial = [(net, "at", given.ablation_epsilon) for net in given.ablation_at]
        wanted = {*((net, "standard", 0.0) for net in given.nets), *adversarial}
        wanted |= {base for base in self.final_bases() if base[1] != "trades"}
        nets = tuple(dict.fromkeys((*given.nets, *given.final_nets, *given.final_at)))
        return sorted(wanted, key=lambda base: (nets.index(base[0]), base[1] != "standard", base[2]))

    def final_bases(self) -> list[Base]:
        """What the final comparison trains, with EMR and without."""
        given, bases = self.settings, []
        for net in given.final_nets:
            bases += [(net, "standard", 0.0), *((net, "at", epsilon) for epsilon in given.epsilons)]
            bases.append((net, "trades", given.trades_epsilon))
        return list(dict.fromkeys([*bases, *((net, "at", given.ablation_epsilon) for net in given.final_at)]))

    def sweep_specs(self, base: Base) -> dict[EMR | None, Spec]:
        """The candidates of one sweep by their settings; None: without EMR."""
        given = self.settings
        net, defense, epsilon = base
        strengths = given.strengths if defense == "standard" else given.strengths_at
        grid = [EMR(s, t, c) for t, c, s in product(given.temperatures, (False, True), strengths)]
        return {emr: Spec(net, defense, epsilon, emr, given.seeds[0], given.sweep_epochs) for emr in (None, *grid)}

    def choice(self, base: Base) -> tuple[Setting, list[Setting], Setting]:
        """The chosen setting, all candidates and the reference, once the sweep is done.

        The highest strong-PGD accuracy on the validation images among those that lose at most a point of clean accuracy
        against the same training without EMR; where none does, the highest clean accuracy.
        """
        found = {emr: self._candidate(emr, spec) for emr, spec in self.sweep_specs(base).items()}
        reference = found.pop(None)
        candidates = list(found.values())
        best = choose(candidates, reference)
        assert isinstance(best, Setting)
        return best, candidates, reference

    def choices(self) -> dict[Base, EMR]:
        """Each base's setting. Raises FileNotFoundError if a sweep is not done."""
        return {base: self.choice(base)[0].emr for base in self.sweep_bases()}

    def _candidate(self, emr: EMR | None, spec: Spec) -> Setting:
        found = read(measure.validation(self.output, spec, self.settings).path)
        given = emr or EMR(0.0, 1.0, False)
        robust = {} if found.get("diverged") else {found["epsilon"]: found["robust"]}
        return Setting(given.strength, given.temperature, found.get("clean"), robust, given.center)

    def final_specs(self, choices: Choices) -> dict[str, list[Spec]]:
        """Methods by name, such as "mlp AT 0.2 + EMR"; a spec for each seed."""
        result = {}
        for base in self.final_bases():
            plain = self._seeds(base, None)
            result[base_title(base)] = plain
            result[f"{base_title(base)} + EMR"] = self._seeds(base, _chosen(choices, base))
            result[f"{base_title(base)}, equal cost"] = [at_equal_cost(spec, self.settings) for spec in plain]
        return result

    def ablation_specs(self, choices: Choices) -> dict[tuple[Base, EMR | None], list[Spec]]:
        """By base and setting; the strength is that of the base's choice, at every temperature and centring."""
        given = self.settings
        result: dict[tuple[Base, EMR | None], list[Spec]] = {}
        for net in given.nets:
            adversarial = [(net, "at", given.ablation_epsilon)] if net in given.ablation_at else []
            for base in [(net, "standard", 0.0), *adversarial]:
                result[base, None] = self._seeds(base, None)
                strength = _chosen(choices, base).strength
                for temperature, center in product(given.temperatures, (False, True)):
                    emr = EMR(strength, temperature, center)
                    result[base, emr] = self._seeds(base, emr)
        return result

    def sources(self, spec: Spec, finals: Mapping[str, list[Spec]]) -> tuple[Spec, ...]:
        """Whose adversarial examples are tried on a final model: the same method's of the next seed, the seed's
        counterpart with or without EMR, the same method's of the other nets that are trained by all methods, and
        standard training's."""
        nets = {spec.net, *self.settings.final_nets}
        among = [other for specs in finals.values() for other in specs if other.net in nets]
        seeds, has_emr = self.settings.seeds, spec.emr is not None
        following = seeds[(seeds.index(spec.seed) + 1) % len(seeds)]

        def tried(other: Spec) -> bool:
            same_net, same_seed = other.net == spec.net, other.seed == spec.seed
            if (other.defense, other.epsilon) == (spec.defense, spec.epsilon):
                if replace(other, seed=spec.seed) == spec:
                    return other.seed == following
                return same_seed and same_net != ((other.emr is not None) == has_emr)
            return same_net and same_seed and other.defense == "standard" and other.emr is None

        return tuple(dict.fromkeys(other for other in among if other != spec and tried(other)))

    def _seeds(self, base: Base, emr: EMR | None) -> list[Spec]:
        net, defense, epsilon = base
        return [Spec(net, defense, epsilon, emr, seed, self.settings.epochs) for seed in self.settings.seeds]

    def stages(self, part: str, choices: Choices) -> Iterator[tuple[str, list[Job]]]:
        """The jobs of a part in stages; those of one stage need only the stages before."""
        output, given = self.output, self.settings
        if part == "sweep":
            specs = [spec for base in self.sweep_bases() for spec in self.sweep_specs(base).values()]
            yield "training", [measure.training(output, spec, given) for spec in specs]
            yield "validation", [measure.validation(output, spec, given) for spec in specs]
            return
        finals = self.final_specs(choices)
        if part == "masking":
            specs = _flat(finals)
            yield "training", [measure.training(output, spec, given) for spec in specs]
            yield "diagnosis", [diagnosis(output, spec, self.sources(spec, finals), given) for spec in specs]
            return
        if part == "final":
            radii = {spec: self.final_radii(spec) for spec in _flat(finals)}
        else:
            radii = {spec: (measure.radius(spec, given),) for spec in _flat(self.ablation_specs(choices))}
        yield "training", [measure.training(output, spec, given) for spec in radii]
        yield "margins", [measure.margins(output, spec, given) for spec in radii]
        # At each model's own radius first: what the tables compare.
        yield "AutoAttack", [measure.attack(output, spec, among[0], given) for spec, among in radii.items()]
        larger = [measure.attack(output, spec, e, given) for spec, among in radii.items() for e in among[1:]]
        if larger:
            yield "AutoAttack at larger radii", larger

    def final_radii(self, spec: Spec) -> tuple[float, ...]:
        """At which radii a final model is attacked: that it was trained with; at larger ones, too, without an attack in
        training. How others fare at other radii, the curves of the diagnosis show, with fewer attacks."""
        own = measure.radius(spec, self.settings)
        if spec.defense != "standard":
            return (own,)
        return tuple(epsilon for epsilon in self.settings.epsilons if epsilon >= own)

    def any_choices(self) -> dict[Base, EMR]:
        """Stand-ins before the sweep is done, to count what there will be to do."""
        return {base: EMR(-1.0, -1.0, False) for base in self.sweep_bases()}


def base_title(base: Base) -> str:
    """ "mlp AT 0.2", for tables."""
    net, defense, epsilon = base
    return f"{net} standard" if defense == "standard" else f"{net} {defense.upper()} {epsilon:g}"


def _chosen(choices: Choices, base: Base) -> EMR:
    """TRADES takes adversarial training's setting at its radius: its own sweep would double what the sweeps cost."""
    net, defense, epsilon = base
    return choices[(net, "at", epsilon) if defense == "trades" else base]


def _flat(specs: Mapping[Any, list[Spec]]) -> list[Spec]:
    return list(dict.fromkeys(spec for group in specs.values() for spec in group))
