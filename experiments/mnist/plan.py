"""Which models each part trains, and what it measures of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from emr_training.selection import Candidate, choose
from experiments.jobs import Job, read
from experiments.mnist import measure
from experiments.mnist.diagnosis import diagnosis
from experiments.mnist.settings import Settings
from experiments.mnist.spec import EMR, Spec, at_equal_cost


class Base(NamedTuple):
    """A net and how it is trained: standard, or an attack's defense and radius; on how many images, None: on all."""

    net: str
    defense: str
    epsilon: float
    images: int | None = None


Choices = Mapping[Base, EMR]
Finalists = Mapping[Base, list[EMR]]


@dataclass(frozen=True)
class Setting(Candidate):
    """A candidate of the sweep, which may be centred."""

    center: bool = False

    @property
    def emr(self) -> EMR:
        """The penalty's setting."""
        return EMR(self.strength, self.temperature, self.center)


@dataclass(frozen=True)
class Choice:
    """How a base's setting was chosen: among the best of one seed's sweep by their means over all seeds.

    reference: training without EMR, over all seeds. swept, swept_reference: of the one seed.
    """

    best: Setting
    finalists: list[Setting]
    reference: Setting
    swept: list[Setting]
    swept_reference: Setting


class Plan:
    """The experiment's models and jobs, below the folder `output`."""

    def __init__(self, output: Path, settings: Settings) -> None:
        self.output, self.settings = output, settings

    def sweep_bases(self) -> list[Base]:
        """What has a sweep of its own: all but TRADES, net by net."""
        given = self.settings
        adversarial = [Base(net, "at", given.ablation_epsilon) for net in given.ablation_at]
        wanted = {*(Base(net, "standard", 0.0) for net in given.nets), *adversarial}
        wanted |= {base for base in self.final_bases() if base.defense != "trades"}
        nets = tuple(dict.fromkeys((*given.nets, *given.final_nets, *given.final_at, *given.few_nets)))

        def place(base: Base) -> tuple[int, bool, float, int]:
            return nets.index(base.net), base.defense != "standard", base.epsilon, base.images or 0

        return sorted(wanted, key=place)

    def final_bases(self) -> list[Base]:
        """What the final comparison trains, with EMR and without."""
        given, bases = self.settings, []
        for net in given.final_nets:
            bases += [Base(net, "standard", 0.0), *(Base(net, "at", epsilon) for epsilon in given.epsilons)]
            bases.append(Base(net, "trades", given.trades_epsilon))
        bases += [Base(net, "at", given.ablation_epsilon) for net in given.final_at]
        bases += [Base(net, "at", given.ablation_epsilon, given.few_images) for net in given.few_nets]
        return list(dict.fromkeys(bases))

    def sweep_specs(self, base: Base) -> dict[EMR | None, Spec]:
        """The candidates of one sweep by their settings; None: without EMR. One seed."""
        given = self.settings
        strengths = given.strengths if base.defense == "standard" else given.strengths_at
        grid = [EMR(s, t, c) for t, c, s in product(given.temperatures, (False, True), strengths)]
        return {emr: self._seeds(base, emr)[0] for emr in (None, *grid)}

    def finalists(self) -> dict[Base, list[EMR]]:
        """Each base's best settings in its sweep. Raises FileNotFoundError if a sweep is not done."""
        return {base: self._best_swept(base) for base in self.sweep_bases()}

    def choice(self, base: Base) -> Choice:
        """The chosen setting, once sweep and runoff are done.

        The highest strong-PGD accuracy on the validation images among those that lose at most a point of clean accuracy
        against the same training without EMR; where none does, the highest clean accuracy. So are the finalists chosen
        in the sweep, and among them the best, then by the means over all seeds.
        """
        swept, swept_reference = self._swept(base)
        finalists = [self._candidate(emr, self._seeds(base, emr)) for emr in self._best_swept(base)]
        reference = self._candidate(None, self._seeds(base, None))
        return Choice(_best(finalists, reference), finalists, reference, swept, swept_reference)

    def choices(self) -> dict[Base, EMR]:
        """Each base's setting. Raises FileNotFoundError if a sweep or runoff is not done."""
        return {base: self.choice(base).best.emr for base in self.sweep_bases()}

    def _swept(self, base: Base) -> tuple[list[Setting], Setting]:
        """A sweep's candidates and its reference."""
        found = {emr: self._candidate(emr, [spec]) for emr, spec in self.sweep_specs(base).items()}
        reference = found.pop(None)
        return list(found.values()), reference

    def _best_swept(self, base: Base) -> list[EMR]:
        left, reference = self._swept(base)
        best: list[EMR] = []
        while len(best) < self.settings.runoff and any(candidate.clean is not None for candidate in left):
            found = _best(left, reference)
            best.append(found.emr)
            left.remove(found)
        return best

    def _candidate(self, emr: EMR | None, specs: list[Spec]) -> Setting:
        """A setting's validation accuracies, the means over `specs`; diverged where one of them did."""
        given = emr or EMR(0.0, 1.0, False)
        found = [read(measure.validation(self.output, spec, self.settings).path) for spec in specs]
        if any(one.get("diverged") for one in found):
            return Setting(given.strength, given.temperature, None, {}, given.center)
        clean, robust = (sum(one[name] for one in found) / len(found) for name in ("clean", "robust"))
        return Setting(given.strength, given.temperature, clean, {found[0]["epsilon"]: robust}, given.center)

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
            adversarial = [Base(net, "at", given.ablation_epsilon)] if net in given.ablation_at else []
            for base in [Base(net, "standard", 0.0), *adversarial]:
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
            if (other.defense, other.epsilon, other.images) == (spec.defense, spec.epsilon, spec.images):
                if replace(other, seed=spec.seed) == spec:
                    return other.seed == following
                return same_seed and same_net != ((other.emr is not None) == has_emr)
            return same_net and same_seed and other.defense == "standard" and other.emr is None

        return tuple(dict.fromkeys(other for other in among if other != spec and tried(other)))

    def _seeds(self, base: Base, emr: EMR | None) -> list[Spec]:
        given = self.settings
        epochs = given.epochs if base.images is None else given.few_epochs
        return [Spec(base.net, base.defense, base.epsilon, emr, seed, epochs, base.images) for seed in given.seeds]

    def sweep_stages(self) -> Iterator[tuple[str, list[Job]]]:
        """The jobs of the sweeps in stages; those of one stage need only the stages before."""
        yield from self._validated([s for base in self.sweep_bases() for s in self.sweep_specs(base).values()])

    def runoff_stages(self, finalists: Finalists) -> Iterator[tuple[str, list[Job]]]:
        """The same of the runoffs, which need the sweeps."""
        yield from self._validated(
            [s for b, among in finalists.items() for e in (None, *among) for s in self._seeds(b, e)]
        )

    def _validated(self, specs: list[Spec]) -> Iterator[tuple[str, list[Job]]]:
        yield "training", [measure.training(self.output, spec, self.settings) for spec in specs]
        yield "validation", [measure.validation(self.output, spec, self.settings) for spec in specs]

    def stages(self, part: str, choices: Choices) -> Iterator[tuple[str, list[Job]]]:
        """The same of the other parts, which need the choices of the runoffs."""
        output, given = self.output, self.settings
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

    def any_finalists(self) -> dict[Base, list[EMR]]:
        """Stand-ins before the sweeps are done, to count what there will be to do."""
        return {base: [EMR(-1.0 - i, -1.0, False) for i in range(self.settings.runoff)] for base in self.sweep_bases()}

    def any_choices(self) -> dict[Base, EMR]:
        """The same before the runoffs are done."""
        return {base: among[0] for base, among in self.any_finalists().items()}


def base_title(base: Base) -> str:
    """ "mlp AT 0.2", for tables."""
    if base.defense == "standard":
        return f"{base.net} standard"
    few = "" if base.images is None else ", few images"
    return f"{base.net} {base.defense.upper()} {base.epsilon:g}{few}"


def _chosen(choices: Choices, base: Base) -> EMR:
    """TRADES takes adversarial training's setting at its radius: its own sweep would double what the sweeps cost."""
    return choices[base._replace(defense="at") if base.defense == "trades" else base]


def _best(candidates: list[Setting], reference: Setting) -> Setting:
    best = choose(candidates, reference)
    assert isinstance(best, Setting)
    return best


def _flat(specs: Mapping[Any, list[Spec]]) -> list[Spec]:
    return list(dict.fromkeys(spec for group in specs.values() for spec in group))
