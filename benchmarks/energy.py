"""What robustness costs: a short AT run and a short AT-EMR run on the digits, and what each has used.

    python -m benchmarks.energy --epochs 15

Each run is `emr train`'s own, in a process of its own, on the same split, weights and order of batches. Costs are the
trainer's: seconds times devices, images that went forward and backward through the network (the penalty's four passes
count as two of each, validation is counted), and the peak of memory: allocated on a GPU, the process's resident set on
the CPU. Robust accuracy is that of PGD-20 on the test split, with its binomial standard error.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment, in_own_process, resident_peak, write_json
from benchmarks.throughput.tables import energy_table, print_tables
from emr_training.config import make_config
from emr_training.data import load_digits
from emr_training.evaluation import Settings, evaluate
from emr_training.training import train

METHODS: dict[str, dict[str, Any]] = {
    "AT": {"defense": "at"},
    "AT-EMR": {"defense": "at", "penalties.emr.strength": 1.0, "penalties.emr.temperature": 0.1},
}
EPSILON = 0.15


def one(method: str, epochs: int, device: str) -> dict[str, Any]:
    """Train and evaluate one method."""
    settings = {"model": "cnn", "trainer.epochs": epochs, "trainer.device": device, "attack.epsilon": EPSILON}
    splits = load_digits(0)
    trained = train(make_config({**settings, **METHODS[method]}), splits.train, None, splits.classes)
    costs = asdict(trained.costs)
    if device == "cpu":
        costs["peak_memory_bytes"] = resident_peak()
    test = splits.test.to(next(trained.model.parameters()).device)
    found = evaluate(trained.model, test, Settings(("pgd20",), (EPSILON,), seed=0, batch_size=1024))
    robust = found.robust("pgd20")[EPSILON]
    return {
        "costs": costs,
        "clean": {"value": found.clean.value, "error": found.clean.standard_error},
        "robust": {"value": robust.value, "error": robust.standard_error},
    }


def measure(epochs: int, device: str) -> dict[str, Any]:
    """Both methods, each in its own process."""
    arguments = ["--epochs", str(epochs), "--device", device]
    methods = {name: in_own_process("benchmarks.energy", *arguments, "--one", name) for name in METHODS}
    return {"title": f"digits, small CNN, {epochs} epochs, Linf {EPSILON:g}", "methods": methods}


def main() -> None:
    """Measure and print; with --output also write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.epochs, options.device)))
        return
    record = measure(options.epochs, options.device)
    print_tables([energy_table(record)])
    if options.output:
        write_json(options.output, {**record, "environment": environment(torch.device(options.device))})


if __name__ == "__main__":
    main()
