"""How strong the attacks are beside independent implementations, on networks trained here.

    python -m benchmarks.attack_strength --data DIR --json benchmarks/results/attack-strength-cpu.json

DIR/mnist holds MNIST's four original .gz files; without --data the digits of scikit-learn are the only data. Robust
accuracy under PGD is given for each of several random starts, with their mean and standard deviation; for DeepFool and
the attack of Carlini and Wagner the part of the images that is left, and the median distance of those classified
correctly, where a failure is infinitely far. torchattacks and foolbox are needed: `make test-independent` installs
them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foolbox  # type: ignore[import-not-found]
import torch
import torchattacks  # type: ignore[import-not-found]
from torch import Tensor, nn

from benchmarks.measure import environment, write_json
from benchmarks.subjects import Subject, Subjects, accuracy, digits_subjects, mnist
from emr_training.attacks import PGD, CarliniWagner, DeepFool
from emr_training.attacks.balls import Norm, distance
from emr_training.config import make_config
from emr_training.data import Data
from emr_training.training import train

STEPS, RUNS, LEARNING_RATE = 20, 9, 0.05
#: A model in evaluation mode, images, a seed -> adversarial examples.
Found = Callable[[nn.Module, Data, int], Tensor]


def subjects(data: Path | None) -> Subjects:
    """The networks, convolutional: with standard, adversarial and adversarial EMR training."""
    found = digits_subjects()
    if data is None:
        return found

    adversarial = {"defense": "at", "attack.epsilon": 0.2}
    recipes: dict[str, dict[str, Any]] = {
        "standard": {},
        "AT": adversarial,
        "AT-EMR": {**adversarial, "penalties.emr": {"strength": 3.0, "temperature": 40.0}},
    }

    def make(name: str, folder: Path) -> Subject:
        training, test = mnist(folder, 6_000, 300)
        recipe = recipes[name]
        settings = {"model": "cnn", "optimizer.learning_rate": 0.05, "trainer.epochs": 3, **recipe}
        model = train(make_config(settings), training, None, 10).model
        standard = name == "standard"
        return Subject(model.eval(), test, {"Linf": 0.08 if standard else 0.2, "L2": 1.0 if standard else 1.5})

    return {
        **found,
        **{f"MNIST, {name}": (lambda name=name: make(name, data / "mnist")) for name in recipes},
    }


def by_foolbox(attack: Any, epsilon: float | None = None) -> Found:
    """A foolbox attack; within epsilon, or as near as it finds one."""

    def find(model: nn.Module, data: Data, seed: int) -> Tensor:
        torch.manual_seed(seed)
        lent = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        found: Tensor = attack(lent, data.x, data.y, epsilons=epsilon)[1]
        return found

    return find


def pgd(norm: Norm, epsilon: float) -> dict[str, Found]:
    """PGD, 20 steps of epsilon / 4, of each implementation."""

    def ours(model: nn.Module, data: Data, seed: int) -> Tensor:
        return PGD(epsilon, STEPS, epsilon / 4, norm=norm, seed=seed)(model, data.x, data.y)

    def theirs(model: nn.Module, data: Data, seed: int) -> Tensor:
        torch.manual_seed(seed)
        kind = {"Linf": torchattacks.PGD, "L2": torchattacks.PGDL2}[norm]
        found: Tensor = kind(model, eps=epsilon, alpha=epsilon / 4, steps=STEPS)(data.x, data.y)
        return found

    kind = {"Linf": foolbox.attacks.LinfPGD, "L2": foolbox.attacks.L2PGD}[norm]
    other = by_foolbox(kind(steps=STEPS, abs_stepsize=epsilon / 4), epsilon)
    return {"emr_training": ours, "torchattacks": theirs, "foolbox": other}


def deepfool(norm: Norm) -> dict[str, Found]:
    """DeepFool, 50 steps, ten classes, overshoot 0.02."""
    kind = {"Linf": foolbox.attacks.LinfDeepFoolAttack, "L2": foolbox.attacks.L2DeepFoolAttack}[norm]
    other = by_foolbox(kind(steps=50, candidates=10, overshoot=0.02, loss="logits"))
    attack = DeepFool(norm=norm)  # type: ignore[arg-type]
    return {"emr_training": lambda model, data, seed: attack(model, data.x, data.y), "foolbox": other}


def carlini_wagner(steps: int) -> dict[str, Found]:
    """The attack of Carlini and Wagner, nine values of c from 0.001."""
    attack = CarliniWagner(steps, runs=RUNS, learning_rate=LEARNING_RATE)
    kind = foolbox.attacks.L2CarliniWagnerAttack
    other = by_foolbox(kind(binary_search_steps=RUNS, steps=steps, stepsize=LEARNING_RATE))
    return {"emr_training": lambda model, data, seed: attack(model, data.x, data.y), "foolbox": other}


def bounded(subject: Subject, norm: Norm, starts: int) -> dict[str, Any]:
    """Robust accuracies under PGD, for each random start."""
    results = {}
    for name, find in pgd(norm, subject.radii[norm]).items():
        began = time.perf_counter()
        examples = [find(subject.model, subject.data, seed) for seed in range(starts)]
        seconds = time.perf_counter() - began
        left = [accuracy(subject.model, x_adv, subject.data.y) for x_adv in examples]
        spread = statistics.stdev(left) if starts > 1 else 0.0
        results[name] = {"robust": left, "mean": statistics.mean(left), "deviation": spread, "seconds": seconds}
    return {"attack": f"PGD-{STEPS}", "norm": norm, "epsilon": subject.radii[norm], "results": results}


def minimal(subject: Subject, attack: str, norm: Norm, contenders: dict[str, Found], count: int) -> dict[str, Any]:
    """What is left, and the distances of images that were classified correctly; those of failures are infinite."""
    data = Data(subject.data.x[:count], subject.data.y[:count])
    with torch.no_grad():
        right = subject.model(data.x).argmax(1) == data.y
    results = {}
    for name, find in contenders.items():
        began = time.perf_counter()
        x_adv = find(subject.model, data, 0)
        seconds = time.perf_counter() - began
        with torch.no_grad():
            broken = right & (subject.model(x_adv).argmax(1) != data.y)
        # foolbox returns a black image for a failure of Carlini and Wagner's attack, which some networks misclassify.
        broken &= x_adv.flatten(1).any(1)
        far = distance(norm, x_adv, data.x)
        median = float(far.where(broken, torch.inf)[right].median())
        results[name] = {
            "robust": float((right & ~broken).double().mean()),
            "median distance": median if math.isfinite(median) else None,
            "mean distance of successes": float(far[broken].mean()),
            "seconds": seconds,
        }
    return {"attack": attack, "norm": norm, "images": len(data), "results": results}


def measure(name: str, subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """All rows of one network."""
    rows = [bounded(subject, norm, options.starts) for norm in subject.radii]
    rows += [minimal(subject, "DeepFool", norm, deepfool(norm), options.images) for norm in subject.radii]
    contenders = carlini_wagner(options.cw_steps)
    rows.append(minimal(subject, "Carlini-Wagner", "L2", contenders, options.cw_images))
    return {
        "model": name,
        "images": len(subject.data),
        "clean": accuracy(subject.model, subject.data.x, subject.data.y),
        "rows": rows,
    }


def table(networks: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = ["| network (clean) | attack | emr_training | torchattacks | foolbox |", "|---|---|---|---|---|"]
    for network in networks:
        for row in network["rows"]:
            cells = []
            for name in ("emr_training", "torchattacks", "foolbox"):
                result = row["results"].get(name)
                if result is None:
                    cells.append("")
                elif "mean" in result:
                    cells.append(f"{100 * result['mean']:.2f} ± {100 * result['deviation']:.2f} %")
                else:
                    median = "none" if result["median distance"] is None else f"{result['median distance']:.4f}"
                    cells.append(f"{median}; {100 * result['robust']:.1f} % left")
            where = f"{row['attack']}, {row['norm']}" + (f" {row['epsilon']:g}" if "epsilon" in row else "")
            lines.append(f"| {network['model']} ({100 * network['clean']:.1f} %) | {where} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Train, attack, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with mnist/; digits alone without it")
    parser.add_argument("--starts", type=int, default=5, help="random starts of PGD")
    parser.add_argument("--images", type=int, default=200, help="for DeepFool")
    parser.add_argument("--cw-images", type=int, default=30)
    parser.add_argument("--cw-steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    networks = []
    for name, make in subjects(options.data).items():
        networks.append(measure(name, make(), options))
        print(table(networks[-1:]), flush=True)
    report = {
        "environment": environment(torch.device("cpu")),
        "packages": {name: importlib.metadata.version(name) for name in ("foolbox", "torchattacks")},
        "Carlini-Wagner": {"steps": options.cw_steps, "runs": RUNS, "learning rate": LEARNING_RATE},
        "networks": networks,
    }
    if options.json is not None:
        write_json(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
