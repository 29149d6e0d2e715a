"""AutoAttack, and each of its attacks alone, beside the code of its authors (`pyautoattack`).

    python -m benchmarks.ensemble_strength --data DIR --json benchmarks/results/ensemble-strength-cpu.json

DIR/mnist holds MNIST's four original .gz files; without --data the digits of scikit-learn are the only data. Networks
are made first: standard, adversarial and adversarial EMR training. Each attack of the standard version then runs alone,
from several seeds, and the whole version once, on more images. The file is written after every network; a second run
with the same file goes on where it ends. `make test-independent` installs pyautoattack.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pyautoattack import AutoAttack as Original  # type: ignore[import-not-found]
from torch import Tensor, nn

from benchmarks.measure import environment, write_json
from benchmarks.subjects import Subject, Subjects, accuracy, digits_subjects, mnist
from emr_training.attacks import AutoAttack
from emr_training.attacks.suite import suite
from emr_training.config import make_config
from emr_training.training import train

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
EPSILON = 0.1
_RECIPES: dict[str, dict[str, Any]] = {
    "standard": {},
    "AT": {"defense": "at"},
    "AT-EMR": {"defense": "at", "penalties.emr": {"strength": 3.0, "temperature": 40.0}},
}

#: A model, images, labels, the attacks by name, a seed -> adversarial examples.
Code = Callable[[nn.Module, Tensor, Tensor, tuple[str, ...], int], Tensor]


def subjects(data: Path | None) -> Subjects:
    """The networks: of digits, and of MNIST's first 10,000 images where `data` has them."""
    found = digits_subjects()
    if data is None:
        return found

    def make(name: str, folder: Path) -> Subject:
        config = make_config(
            {
                "model": {
                    "name": "experiments.nets:cnn",
                    "options": {"input_shape": [1, 28, 28], "classes": 10, "width": 8},
                },
                "attack": {"epsilon": EPSILON, "steps": 5},
                "optimizer": {"name": "adamw", "learning_rate": 2e-3, "weight_decay": 5e-4},
                "schedule": {"name": "cyclic", "peak": 0.3},
                "trainer": {"epochs": 8},
                **_RECIPES[name],
            }
        )
        training, test = mnist(folder, 10_000, 10_000)
        return Subject(train(config, training, None, 10).model.eval(), test, {"Linf": EPSILON})

    return {**found, **{f"MNIST, {name}": (lambda name=name: make(name, data / "mnist")) for name in _RECIPES}}


def codes(epsilon: float) -> dict[str, Code]:
    """Both implementations, in batches of 250."""

    def ours(model: nn.Module, x: Tensor, y: Tensor, attacks: tuple[str, ...], seed: int) -> Tensor:
        # With the settings that they have in the standard version.
        chosen = {
            name: attack for name, attack in suite("Linf", epsilon, "standard", seed=seed).items() if name in attacks
        }
        attack = AutoAttack(eps=epsilon, version="custom", attacks_to_run=chosen, seed=seed, verbose=False)
        return attack.run(model, x, y, batch_size=250)[0]

    def theirs(model: nn.Module, x: Tensor, y: Tensor, attacks: tuple[str, ...], seed: int) -> Tensor:
        attack = Original(model, norm="Linf", eps=epsilon, version="standard", seed=seed, device="cpu")
        attack.attacks_to_run = list(attacks)
        x_adv: Tensor = attack.run_standard_evaluation(x, y, batch_size=250)[0]
        return x_adv

    return {"emr_training": ours, "pyautoattack": theirs}


def measure(name: str, subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """All rows of one network: robust accuracies from each seed, and seconds of the processor."""
    epsilon = subject.radii["Linf"]
    plans = [(attack, (attack,), options.alone, range(options.seeds)) for attack in ATTACKS]
    rows = []
    for title, attacks, count, seeds in [*plans, ("AutoAttack", ATTACKS, options.images, range(1))]:
        x, y = subject.data.x[:count], subject.data.y[:count]
        row: dict[str, Any] = {"attack": title, "images": len(y), "results": {}}
        for code, run in codes(epsilon).items():
            began = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                left = [accuracy(subject.model, run(subject.model, x, y, attacks, seed), y) for seed in seeds]
            row["results"][code] = {"robust": left, "processor": round(time.process_time() - began, 1)}
        rows.append(row)
        told = ", ".join(f"{code} {figure(result)}" for code, result in row["results"].items())
        print(f"{name}, {title}, {len(y)} images: {told}", flush=True)
    x, y = subject.data.x[: options.images], subject.data.y[: options.images]
    return {"model": name, "epsilon": epsilon, "clean": accuracy(subject.model, x, y), "rows": rows}


def figure(result: Mapping[str, Any]) -> str:
    """Robust accuracy in %: mean and standard deviation over the seeds."""
    left = [100 * value for value in result["robust"]]
    spread = f" ± {statistics.stdev(left):.2f}" if len(left) > 1 else ""
    return f"{statistics.mean(left):.2f}{spread}"


def table(networks: Sequence[Mapping[str, Any]]) -> str:
    """The figures as Markdown."""
    names = [row["attack"] for row in networks[0]["rows"]]
    lines = [f"| network, clean accuracy | code | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for network in networks:
        title = f"{network['model']}, {100 * network['clean']:.1f} %, ε = {network['epsilon']:g}"
        for code in network["rows"][0]["results"]:
            cells = [figure(row["results"][code]) for row in network["rows"]]
            lines.append(f"| {title} | {code} | {' | '.join(cells)} |")
            title = ""
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Train, attack, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with mnist/; digits alone without it")
    parser.add_argument("--images", type=int, default=1_000, help="for the whole of AutoAttack, as far as there are")
    parser.add_argument("--alone", type=int, default=200, help="images for each attack alone")
    parser.add_argument("--seeds", type=int, default=3, help="for each attack alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the figures, and what it has is not done again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    sizes = {"images": options.images, "alone": options.alone, "seeds": options.seeds}
    packages = {"pyautoattack": importlib.metadata.version("pyautoattack")}
    report: dict[str, Any] = {"sizes": sizes, "packages": packages, "networks": []}
    if options.json is not None and options.json.exists():
        report = json.loads(options.json.read_text())
        if report["sizes"] != sizes:
            parser.error(f"{options.json} has figures of {report['sizes']}; expected these, or another --json")
    report["environment"] = environment(torch.device("cpu"))
    done = {network["model"] for network in report["networks"]}
    for name, make in subjects(options.data).items():
        if name in done:
            continue
        report["networks"].append(measure(name, make(), options))
        if options.json is not None:
            write_json(options.json, report)
    print(table(report["networks"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
