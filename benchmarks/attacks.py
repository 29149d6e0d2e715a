"""PGD-10: emr_training, plain eager PyTorch, torchattacks where it is installed, and the convolutions alone.

    python -m benchmarks.attacks --model preactresnet-18 --batch 64
    python -m benchmarks.attacks --model wrn-34-10 --batch 128 --device cuda --precision bf16

The bound is the time of the same convolutions alone: a forward and a data gradient of each at every step, in the faster
of the two memory formats. Every contender starts at the same image without noise and takes the same sign steps; they
have to find the same loss before anything is timed. Times are medians of interleaved repetitions in one process.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import Step, environment, interleaved, matmul_ceiling
from benchmarks.penalty import FORMATS, PRECISIONS, Call, Setting, calls_of
from emr_training.attacks import PGD

EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10
Search = Callable[[], Tensor]


def eager(model: nn.Module, x: Tensor, y: Tensor, setting: Setting) -> Search:
    """A PGD loop as it is commonly written, parameters frozen."""
    for p in model.parameters():
        p.requires_grad_(False)

    def search() -> Tensor:
        point = x.clone()
        for _ in range(STEPS):
            point = point.detach().requires_grad_()
            with setting.autocast():
                loss = F.cross_entropy(model(point).float(), y)
            (gradient,) = torch.autograd.grad(loss, point)
            with torch.no_grad():
                point = point + STEP_SIZE * gradient.sign()
                point = torch.min(torch.max(point, x - EPSILON), x + EPSILON).clamp(0, 1)
        return point.detach()

    return search


def compiled(model: nn.Module, x: Tensor, y: Tensor, setting: Setting) -> Search:
    """The same loop over a model compiled by `torch.compile`."""
    return eager(torch.compile(model), x, y, setting)  # type: ignore[arg-type]


def ours(model: nn.Module, x: Tensor, y: Tensor, setting: Setting) -> Search:
    """emr_training's PGD."""
    precision: Any = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[setting.precision]
    attack = PGD(EPSILON, STEPS, STEP_SIZE, random_start=False, keep="last", precision=precision)
    return lambda: attack(model, x, y)


def torchattacks(model: nn.Module, x: Tensor, y: Tensor, setting: Setting) -> Search:
    """torchattacks's PGD as it ships."""
    from torchattacks import PGD as Shipped  # type: ignore[import-not-found]

    attack = Shipped(model, eps=EPSILON, alpha=STEP_SIZE, steps=STEPS, random_start=False)

    def search() -> Tensor:
        with setting.autocast():
            found: Tensor = attack(x, y)
        return found

    return search


WAYS = {"eager": eager, "emr_training": ours, "torchattacks": torchattacks}


def convolutions_alone(calls: list[Call]) -> Step:
    """One forward and one data gradient of each call, ten times."""

    def step() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                for call in calls:
                    options = (call.stride, call.padding, [1, 1], False, [0, 0], 1)
                    torch.ops.aten.convolution.default(call.given, call.weight, None, *options)
                    torch.ops.aten.convolution_backward.default(
                        call.cotangent, call.given, call.weight, None, *options, [True, False, False]
                    )

    return step


def measure(setting: Setting, repetitions: int, with_compile: bool) -> dict[str, Any]:
    """Times and ratios of all contenders, which have to find the same loss first."""
    searches: dict[str, Search] = {}
    losses: dict[str, float] = {}
    absent: dict[str, str] = {}
    steps: dict[str, Step] = {}
    y = torch.randint(10, (setting.batch,), generator=torch.Generator().manual_seed(2)).to(setting.device)
    for layout, memory_format in FORMATS.items():
        for name, way in (WAYS | ({"compiled": compiled} if with_compile else {})).items():
            # The first convolution reads the image: nothing but the common start is random.
            model, x = setting.make(memory_format)
            try:
                search = way(model, x, y, setting)
                x_adv = search()
            except ImportError as error:
                absent[name] = str(error)
                continue
            with torch.no_grad():
                losses[f"{name}, {layout}"] = float(F.cross_entropy(model(x_adv), y))
            searches[f"{name}, {layout}"] = search
        model, x = setting.make(memory_format)
        calls = calls_of(model, x, memory_format, PRECISIONS[setting.precision])
        steps[f"convolutions, {layout}"] = convolutions_alone(calls)
    common = losses["eager, nchw"]
    worst = max(abs(loss / common - 1) for loss in losses.values())
    if worst > (1e-2 if setting.precision == "fp32" else 1e-1):
        raise RuntimeError(f"the contenders' losses differ by {worst:.1%}: {losses}: nothing is timed")
    times = interleaved(steps | searches, repetitions, setting.device)
    bound = min(times[f"convolutions, {layout}"]["median"] for layout in FORMATS)
    limit = None
    if setting.device.type == "cuda":
        operations = 2 * STEPS * sum(call.operations for call in calls)
        limit = operations / matmul_ceiling(setting.device, PRECISIONS[setting.precision])
    return {
        "model": setting.model,
        "batch": setting.batch,
        "precision": setting.precision,
        "environment": environment(setting.device),
        "losses": losses,
        "absent": absent,
        "seconds": times,
        "bound": bound,
        "limit": limit,
        "fraction of the bound": {name: bound / times[name]["median"] for name in searches},
    }


def show(record: dict[str, Any]) -> None:
    """Print a record of `measure`."""
    where = record["environment"]
    print(
        f"PGD-{STEPS}, {record['model']}, batch {record['batch']}, {record['precision']}, {where['device']}, "
        f"{where['threads']} threads, torch {where['torch']}"
    )
    print(f"{'':32}{'seconds':>10}{'min':>9}{'max':>9}{'of bound':>10}{'loss':>10}")
    for name, t in record["seconds"].items():
        loss = f"{record['losses'][name]:10.4f}" if name in record["losses"] else ""
        print(f"{name:32}{t['median']:10.4f}{t['min']:9.4f}{t['max']:9.4f}{record['bound'] / t['median']:10.0%}{loss}")
    for name, reason in record["absent"].items():
        print(f"{name} was left out: {reason}")


def main() -> None:
    """Measure and print; with --output also write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="preactresnet-18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="with the loop over a compiled model (minutes on a CPU)")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    setting = Setting(options.model, options.batch, options.device, options.precision)
    try:
        record = measure(setting, options.repetitions, options.compile)
    except RuntimeError as error:
        sys.exit(str(error))
    show(record)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
