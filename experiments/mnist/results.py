"""All numbers of the experiment in one dictionary, from the results on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from emr_training.reporting import environment
from experiments.jobs import Job, read
from experiments.mnist import measure
from experiments.mnist.diagnosis import CRITERIA, diagnosis, verdict
from experiments.mnist.plan import Choices, Plan, Setting, base_title
from experiments.mnist.spec import Spec
from experiments.statistics import bootstrapped, paired, spread

#: What may predict robust accuracy: where it stands in the margins' results, at clean images.
QUANTITIES = {
    "effective margin, L2": ("clean_L2", "margins"),
    "effective margin, L∞": ("clean_Linf", "margins"),
    "effective weight norm, L2": ("clean_L2", "weight_norms"),
    "effective weight norm, L1": ("clean_Linf", "weight_norms"),
    "probabilistic margin": ("clean_L2", "probabilistic"),
}


class Collector:
    """Reads results, and remembers which are missing."""

    def __init__(self, plan: Plan, choices: Choices) -> None:
        self.plan, self.choices = plan, choices
        self.missing: list[str] = []

    def all(self) -> dict[str, Any]:
        """Everything: settings, seeds, spreads, environment, and what has not been run."""
        plan = self.plan
        return {
            "settings": asdict(plan.settings),
            "environment": environment(),
            "sweep": self.sweep(),
            "final": self.final(),
            "differences": self.differences(),
            "ablation": self.ablation(),
            "masking": self.masking(),
            "predict": self.predict(),
            "missing": sorted(set(self.missing)),
            "computing_seconds": self.seconds(),
        }

    def sweep(self) -> dict[str, Any]:
        """Every candidate's validation accuracies, of one seed, the finalists' over all seeds, and which was chosen."""
        result = {}
        for base in self.plan.sweep_bases():
            choice = self.plan.choice(base)
            result[base_title(base)] = {
                "chosen": str(choice.best.emr),
                "without_emr": choice.reference.as_dict(),
                "finalists": [{**_setting(c), "chosen": c is choice.best} for c in choice.finalists],
                "one_seed": {
                    "without_emr": choice.swept_reference.as_dict(),
                    "candidates": [_setting(c) for c in choice.swept],
                },
            }
        return result

    def final(self) -> dict[str, Any]:
        """Each method's numbers, over its seeds."""
        finals = self.plan.final_specs(self.choices)
        found = {title: self._summary(specs, self.plan.final_radii(specs[0])) for title, specs in finals.items()}
        return {title: summary for title, summary in found.items() if summary is not None}

    def differences(self) -> list[dict[str, Any]]:
        """What EMR changes, seed by seed: against the same epochs without it, and against equal cost."""
        finals, result = self.final(), []
        for title in finals:
            if f"{title} + EMR" not in finals:
                continue
            emr = finals[f"{title} + EMR"]
            for against in (title, f"{title}, equal cost"):
                if against in finals:
                    radii = [radius for radius in emr["autoattack"] if radius in finals[against]["autoattack"]]
                    names = ("test_accuracy", "median_margin", *radii)
                    result.append(
                        {
                            "method": f"{title} + EMR",
                            "against": against,
                            **{n: paired(_values(finals[against], n), _values(emr, n)) for n in names},
                        }
                    )
        return result

    def ablation(self) -> list[dict[str, Any]]:
        """Temperatures and centring at one strength, without EMR beside."""
        rows = []
        for (base, emr), specs in self.plan.ablation_specs(self.choices).items():
            summary = self._summary(specs, (measure.radius(specs[0], self.plan.settings),))
            if summary is not None:
                rows.append({"base": base_title(base), "setting": str(emr) if emr else "λ=0", **summary})
        return rows

    def masking(self) -> dict[str, Any]:
        """Each final model's diagnosis and verdict."""
        plan, models = self.plan, {}
        finals = plan.final_specs(self.choices)
        for title, specs in finals.items():
            for spec in specs:
                found = self._read(diagnosis(plan.output, spec, (), plan.settings))
                epsilon = measure.radius(spec, plan.settings)
                ensemble = self._read(measure.attack(plan.output, spec, epsilon, plan.settings))
                if found is None or ensemble is None:
                    continue
                kept = {k: v for k, v in found.items() if k not in ("spec", "kind", "seconds", "surface")}
                judged = verdict(found, ensemble["warnings"])
                models[spec.name] = {"method": title, "seed": spec.seed, **kept, **judged}
        return {"criteria": CRITERIA, "models": models}

    def predict(self) -> dict[str, Any]:
        """Rank correlations with AutoAttack accuracy over all models, at each radius."""
        draws = self.plan.settings.bootstrap
        result: dict[str, Any] = {}
        for epsilon in self.plan.settings.epsilons:
            points = self.points(epsilon)
            if len(points) < 3:
                continue
            groups = [p["group"] for p in points]
            robust = [p["robust"] for p in points]
            found = {q: bootstrapped([p[q] for p in points], robust, groups, draws=draws) for q in QUANTITIES}
            result[f"{epsilon:g}"] = found
        return result

    def points(self, epsilon: float) -> list[dict[str, Any]]:
        """Every model with AutoAttack at this radius: its accuracy, what may predict it, and what it is."""
        plan = self.plan
        finals = [s for group in plan.final_specs(self.choices).values() for s in group]
        specs = [s for s in finals if epsilon in plan.final_radii(s)]
        ablation = [s for group in plan.ablation_specs(self.choices).values() for s in group]
        specs += [s for s in ablation if epsilon == measure.radius(s, plan.settings)]
        points = []
        for spec in dict.fromkeys(specs):
            margins = self._read(measure.margins(plan.output, spec, plan.settings))
            ensemble = self._read(measure.attack(plan.output, spec, epsilon, plan.settings))
            if margins is None or ensemble is None:
                continue
            medians = {name: margins[part][column]["median"] for name, (part, column) in QUANTITIES.items()}
            if all(median is not None for median in medians.values()):
                points.append({**spec.as_dict(), "robust": ensemble["robust"], **medians})
        return points

    def seconds(self) -> float:
        """What all results took, of one process."""
        paths = self.plan.output.glob("*/*.json")
        return round(sum(read(path)["seconds"] for path in paths if path.parent.name != "report"), 1)

    def _summary(self, specs: Sequence[Spec], epsilons: Sequence[float]) -> dict[str, Any] | None:
        """Over the seeds, at the radii where all are done; None where they are not even at the first one."""
        output, given = self.plan.output, self.plan.settings
        trained = [self._read(measure.training(output, spec, given)) for spec in specs]
        found = [self._read(measure.margins(output, spec, given)) for spec in specs]
        ensembles = {e: [self._read(measure.attack(output, spec, e, given)) for spec in specs] for e in epsilons}
        own = ensembles[epsilons[0]]
        if any(part is None for group in (trained, found, own) for part in group):
            return None
        ensembles = {e: parts for e, parts in ensembles.items() if all(part is not None for part in parts)}

        def over(parts: Sequence[Any], value: Callable[[Any], float | None]) -> dict[str, Any]:
            return spread([value(part) for part in parts])

        return {
            "seeds": [spec.seed for spec in specs],
            "emr": None if specs[0].emr is None else str(specs[0].emr),
            "epochs": specs[0].epochs,
            "epsilon": specs[0].epsilon,
            "test_accuracy": over(found, lambda m: m["test_accuracy"]["value"]),
            "autoattack": {f"{e:g}": over(parts, lambda a: a["robust"]) for e, parts in ensembles.items()},
            "median_margin": over(found, lambda m: m["clean_L2"]["margins"]["median"]),
            "median_margin_attacked": over(found, lambda m: m["attacked_L2"]["margins"]["median"]),
            "median_weight_norm": over(found, lambda m: m["clean_L2"]["weight_norms"]["median"]),
            "median_gradient_T40": over(found, lambda m: m["gradient_T40"]["median"]),
            "median_mean_logit_gradient": over(found, lambda m: m["mean_logit_gradient"]["median"]),
            "training_forwards": over(trained, lambda t: t["costs"]["forwards"]),
            "training_backwards": over(trained, lambda t: t["costs"]["backwards"]),
            "training_seconds": over(trained, lambda t: t["costs"]["seconds"]),
        }

    def _read(self, job: Job) -> dict[str, Any] | None:
        if job.done:
            found = read(job.path)
            if not found.get("diverged"):
                return found
        self.missing.append(str(job.path.relative_to(self.plan.output)))
        return None


def _setting(candidate: Setting) -> dict[str, Any]:
    return {"center": candidate.center, **candidate.as_dict()}


def _values(summary: dict[str, Any], name: str) -> list[float | None]:
    """A quantity's values by seed; a radius is AutoAttack's."""
    values: list[float | None] = (summary["autoattack"].get(name) or summary[name])["values"]
    return values
