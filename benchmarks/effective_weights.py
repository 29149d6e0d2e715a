"""Effective weights of all classes of a multilayer perceptron: emr_kernels, torch.func, autograd and dense products.

    python -m benchmarks.effective_weights
    python -m benchmarks.effective_weights --sizes 784 1024 1024 1024 10 --batch 256 --json FILE

"vmap(jacrev)" is the Jacobian of one sample, mapped over the batch; "jacrev of the sum" that of the logits summed over
the batch; "autograd" one backward pass for each class. The bound is the time of the matrix products alone, as dense
ones into reused memory: the forward's, and for the cotangents of all classes one with each layer's weight. What
leaves out the units that are off may beat it. "effective_weight_norms" does not write the weights that the others do.

Contenders have to agree in float64 first. Times are medians of interleaved repetitions in one process, ratios medians
of the ratios of one repetition. Memory is told twice, each contender in a process of its own: the largest sum of
tensors alive at once over the call, the result among them, and on the CPU the growth of the resident set at its peak,
from a heap that was given back to the system just before.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

from benchmarks.measure import Step, environment, in_own_process, memory_of, seconds_of, synchronize
from emr_kernels import effective_weight_norms, effective_weights, linearize

OURS, BOUND = "effective_weights", "dense products"


@dataclass(frozen=True)
class Setting:
    """What every contender has in common."""

    sizes: tuple[int, ...]
    batch: int
    device: torch.device

    def make(self, batch: int | None = None, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, torch.Tensor]:
        """The network, with PyTorch's own initial weights, and a batch."""
        torch.manual_seed(0)
        layers = [part for a, b in pairwise(self.sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        x = torch.rand(batch or self.batch, self.sizes[0], generator=torch.Generator().manual_seed(1))
        model = nn.Sequential(*layers[:-1]).eval().requires_grad_(False).to(self.device, dtype)
        return model, x.to(self.device, dtype)


def weights_by_kernels(model: nn.Sequential, x: torch.Tensor) -> Step:
    """emr_kernels, after its export."""
    linearize(model, x[:2])
    return lambda: effective_weights(model, x)


def norms_by_kernels(model: nn.Sequential, x: torch.Tensor) -> Step:
    """Their norms alone."""
    linearize(model, x[:2])
    return lambda: effective_weight_norms(model, x, classes=range(model[-1].out_features))


def by_vmap(model: nn.Sequential, x: torch.Tensor) -> Step:
    """The Jacobian of one sample for every sample."""
    parameters = dict(model.named_parameters())
    jacobian = vmap(jacrev(lambda sample: functional_call(model, parameters, (sample[None],))[0]))
    return lambda: jacobian(x)


def by_sum(model: nn.Sequential, x: torch.Tensor) -> Step:
    """The Jacobian of the summed logits: no sample's logits depend on another's input."""
    parameters = dict(model.named_parameters())
    jacobian = jacrev(lambda batch: functional_call(model, parameters, (batch,)).sum(0))
    return lambda: jacobian(x).movedim(0, 1)


def by_autograd(model: nn.Sequential, x: torch.Tensor) -> Step:
    """One backward pass for each class."""

    def step() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        rows = [torch.autograd.grad(z.sum(), leaf, retain_graph=True)[0] for z in logits.unbind(1)]
        return torch.stack(rows, 1)

    return step


def dense_products(model: nn.Sequential, x: torch.Tensor) -> Step:
    """The matrix products that a dense computation cannot do without."""
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    rows = len(x) * weights[-1].shape[0]
    pairs = [(torch.randn(len(x), w.shape[1], device=x.device, dtype=x.dtype), w.T) for w in weights]
    pairs += [(torch.randn(rows, w.shape[0], device=x.device, dtype=x.dtype), w) for w in reversed(weights[:-1])]
    outs = [a.new_empty(a.shape[0], b.shape[1]) for a, b in pairs]

    def step() -> None:
        for (a, b), out in zip(pairs, outs, strict=True):
            torch.mm(a, b, out=out)

    return step


def give_back() -> None:
    """Return what glibc's heap holds unused, which a call would otherwise use before it grows the process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


CONTENDERS: dict[str, Callable[[nn.Sequential, torch.Tensor], Step]] = {
    OURS: weights_by_kernels,
    "effective_weight_norms": norms_by_kernels,
    "vmap(jacrev)": by_vmap,
    "jacrev of the sum": by_sum,
    "autograd": by_autograd,
    BOUND: dense_products,
}


def check_agreement(setting: Setting) -> float:
    """Largest relative difference of the Jacobians, and of the norms, from autograd's, in float64."""
    model, x = setting.make(min(setting.batch, 16), torch.float64)
    expected = by_autograd(model, x)()
    differences = []
    for name, make in CONTENDERS.items():
        if name != BOUND:
            found = make(model, x)()
            right = expected if found.dim() == 3 else expected.norm(dim=2)
            differences.append(float((found - right).norm() / right.norm()))
    return max(differences)


def measure(setting: Setting, repetitions: int) -> dict[str, Any]:
    """Times, memory and ratios of all contenders, which have to agree first."""
    difference = check_agreement(setting)
    if not difference < 1e-10:
        raise RuntimeError(f"the contenders differ by {difference:.1e} in float64: nothing is timed")
    arguments = ["--sizes", *map(str, setting.sizes), "--batch", str(setting.batch), "--device", str(setting.device)]
    memory = {
        name: in_own_process("benchmarks.effective_weights", *arguments, "--memory-of", name)
        for name in CONTENDERS
        if name != BOUND
    }
    model, x = setting.make()
    steps = {name: make(model, x) for name, make in CONTENDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round in range(repetitions + 2):
        for name, step in steps.items():
            synchronize(setting.device)
            taken = seconds_of(step, setting.device)
            if round > 1:
                seconds[name].append(taken)
    ratios = {}
    for name in steps:
        quotients = [theirs / mine for theirs, mine in zip(seconds[name], seconds[OURS], strict=True)]
        ratios[name] = {"time": statistics.median(quotients)}
        for kind in memory.get(name, ()):
            ratios[name][kind] = memory[name][kind] / memory[OURS][kind]
    return {
        "sizes": setting.sizes,
        "batch": setting.batch,
        "environment": environment(setting.device),
        "difference": difference,
        "repetitions": repetitions,
        "seconds": {n: {"median": statistics.median(s), "min": min(s), "max": max(s)} for n, s in seconds.items()},
        "memory": memory,
        "ratios": ratios,
    }


def show(record: dict[str, Any]) -> None:
    """Print a record of `measure`."""
    where = record["environment"]
    sizes = "-".join(map(str, record["sizes"]))
    print(f"{sizes}, batch {record['batch']}, {where['device']}, {where['threads']} threads, torch {where['torch']}")
    print(f"contenders agree in float64 to {record['difference']:.1e} (largest relative difference)")
    print(f"{'':24}{'seconds':>9}{'min':>9}{'max':>9}{'tensors MB':>12}{'resident MB':>13}   times ours")
    for name, t in record["seconds"].items():
        held = record["memory"].get(name, {})
        megabytes = "".join(
            f"{held[kind] / 1e6:{width}.1f}" if kind in held else " " * width
            for kind, width in (("tensors", 12), ("resident", 13))
        )
        ratios = ", ".join(f"{kind} {value:.2f}" for kind, value in record["ratios"][name].items())
        print(f"{name:24}{t['median']:9.4f}{t['min']:9.4f}{t['max']:9.4f}{megabytes}   {ratios}")


def main() -> None:
    """Measure and print; with --json also write a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[784, 1024, 1024, 1024, 10])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    setting = Setting(tuple(options.sizes), options.batch, options.device)
    if options.memory_of:
        make = CONTENDERS[options.memory_of]
        small = make(*setting.make(2))

        def warm_up() -> None:
            small()
            give_back()

        found = memory_of(make(*setting.make()), warm_up, setting.device)
        told = {"tensors": found["tensors"]}
        if "peak" in found:
            told["resident"] = found["peak"] - found["before"]
        print(json.dumps(told))
        return
    try:
        record = measure(setting, options.repetitions)
    except RuntimeError as error:
        sys.exit(str(error))
    show(record)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
