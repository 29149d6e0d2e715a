"""EMR penalty and its parameter gradient: emr_kernels, double backward, and the convolutions alone.

    python -m benchmarks.penalty --model wrn-16-4 --batch 64
    python -m benchmarks.penalty --model wrn-34-10 --batch 128 --device cuda --precision bf16

The bound is the time of the same convolutions alone: two forwards, one data gradient and one weight gradient of each,
in the faster of the two memory formats. On a GPU there is also the limit: their operations at the measured rate of a
matrix product. Times are medians of interleaved repetitions in one process. Memory is told twice, each contender in a
process of its own: the largest sum of tensors alive at once over the call (beyond those that were there before it),
which repeats to the byte, and on the CPU the resident set's peak, with Python, torch and scratch memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Step, environment, in_own_process, interleaved, matmul_ceiling, memory_of
from benchmarks.models import build
from emr_kernels import EffectiveWeightPenalty

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEMPERATURE = 1.0


@dataclass(frozen=True)
class Setting:
    """What every contender has in common."""

    model: str
    batch: int
    device: torch.device
    precision: str

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around a forward: what low precision means in training."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, PRECISIONS[self.precision])

    def make(self, memory_format: torch.memory_format, batch: int | None = None) -> tuple[nn.Module, torch.Tensor]:
        """The network and a batch."""
        model, shape = build(self.model)
        x = torch.rand(batch or self.batch, *shape, generator=torch.Generator().manual_seed(1))
        model = model.eval().to(self.device, memory_format=memory_format)
        return model, x.to(self.device).contiguous(memory_format=memory_format)


def double_backward(model: nn.Module, x: torch.Tensor, setting: Setting) -> Step:
    """The released EMR code's way: the effective weight with a graph, then backward through it."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        with setting.autocast():
            logits = model(leaf).float() if setting.precision != "fp32" else model(leaf)
        mix = torch.softmax(logits / TEMPERATURE, 1).detach()
        (weight,) = torch.autograd.grad((mix * logits).sum() / len(x), leaf, create_graph=True)
        weight.square().sum().backward()

    return step


def linear_passes(model: nn.Module, x: torch.Tensor, setting: Setting) -> Step:
    """emr_kernels."""
    penalty = EffectiveWeightPenalty(model, temperature=TEMPERATURE, checks="never")
    penalty.prepare(x)
    assert penalty.engine == "linearized", penalty.engine_reason

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with setting.autocast():
            value = penalty(x)
        value.backward()

    return step


@dataclass(frozen=True)
class Call:
    """One convolution of the network, on tensors made before."""

    given: torch.Tensor
    weight: torch.Tensor
    cotangent: torch.Tensor
    stride: list[int]
    padding: list[int]

    @property
    def operations(self) -> int:
        """Multiplications and additions of one forward."""
        return 2 * self.cotangent.numel() * self.weight[0].numel()


def calls_of(model: nn.Module, x: torch.Tensor, memory_format: torch.memory_format, dtype: torch.dtype) -> list[Call]:
    """Every convolution that a forward runs."""
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        given = torch.randn_like(args[0], dtype=dtype).contiguous(memory_format=memory_format)
        cotangent = torch.randn_like(output, dtype=dtype).contiguous(memory_format=memory_format)
        weight = module.weight.detach().to(dtype).contiguous(memory_format=memory_format)
        calls.append(Call(given, weight, cotangent, list(module.stride), [int(p) for p in module.padding]))

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return calls


def convolutions_alone(calls: list[Call]) -> Step:
    """Two forwards, one data and one weight gradient of each call."""
    convolution = torch.ops.aten.convolution.default
    gradient = torch.ops.aten.convolution_backward.default

    def step() -> None:
        with torch.no_grad():
            for call in calls:
                options = (call.stride, call.padding, [1, 1], False, [0, 0], 1)
                convolution(call.given, call.weight, None, *options)
                convolution(call.given, call.weight, None, *options)
                gradient(call.cotangent, call.given, call.weight, None, *options, [True, False, False])
                gradient(call.cotangent, call.given, call.weight, None, *options, [False, True, False])

    return step


def contender(name: str, setting: Setting, batch: int | None = None) -> Step:
    """A timed step by name: "kernels", "double backward" or "convolutions", then the memory format."""
    kind, _, layout = name.partition(", ")
    memory_format = FORMATS[layout]
    model, x = setting.make(memory_format, batch)
    if kind == "convolutions":
        return convolutions_alone(calls_of(model, x, memory_format, PRECISIONS[setting.precision]))
    return (linear_passes if kind == "kernels" else double_backward)(model, x, setting)


NAMES = [f"{kind}, {layout}" for kind in ("convolutions", "double backward", "kernels") for layout in FORMATS]


def check_agreement(setting: Setting) -> float:
    """Largest relative difference of a parameter's gradient between the two ways, in float64 on a small batch."""
    exact = Setting(setting.model, min(setting.batch, 4), setting.device, "fp32")
    model, x = exact.make(torch.contiguous_format)
    model, x = model.double(), x.double()
    gradients = []
    for way in (double_backward, linear_passes):
        way(model, x, exact)()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None and p.grad.any()])
    assert len(gradients[0]) == len(gradients[1])
    return max(float((a - b).norm() / a.norm()) for a, b in zip(*gradients, strict=True))


def limit_in_seconds(setting: Setting) -> float:
    """The convolutions' operations in four passes, at the measured rate of a matrix product."""
    model, x = setting.make(torch.channels_last)
    dtype = PRECISIONS[setting.precision]
    operations = 4 * sum(call.operations for call in calls_of(model, x, torch.channels_last, dtype))
    return operations / matmul_ceiling(setting.device, dtype)


def measure(setting: Setting, repetitions: int) -> dict[str, Any]:
    """Times, memory and ratios of all contenders, which have to agree first."""
    difference = check_agreement(setting)
    if difference > 1e-10:
        raise RuntimeError(f"the contenders' gradients differ by {difference:.1e} in float64: nothing is timed")
    arguments = ["--model", setting.model, "--batch", str(setting.batch), "--device", str(setting.device)]
    arguments += ["--precision", setting.precision]
    memory = {
        name: in_own_process("benchmarks.penalty", *arguments, "--memory-of", name)
        for name in NAMES
        if "convolutions" not in name
    }
    steps = {name: contender(name, setting) for name in NAMES}
    times = interleaved(steps, repetitions, setting.device)
    bound = min(times[f"convolutions, {layout}"]["median"] for layout in FORMATS)
    limit = limit_in_seconds(setting) if setting.device.type == "cuda" else None
    ratios: dict[str, dict[str, float]] = {}
    for layout in FORMATS:
        ours, theirs = f"kernels, {layout}", f"double backward, {layout}"
        mine = times[ours]["median"]
        ratios[layout] = {
            "speed-up over double backward": times[theirs]["median"] / mine,
            "fraction of the bound": bound / mine,
            "tensor memory over double backward's": memory[ours]["tensors"] / memory[theirs]["tensors"],
        }
        if limit is not None:
            ratios[layout]["fraction of the limit"] = limit / mine
        else:
            ratios[layout]["peak resident set over double backward's"] = memory[ours]["peak"] / memory[theirs]["peak"]
    return {
        "model": setting.model,
        "batch": setting.batch,
        "precision": setting.precision,
        "environment": environment(setting.device),
        "gradient difference": difference,
        "seconds": times,
        "bound": bound,
        "limit": limit,
        "memory": memory,
        "ratios": ratios,
    }


def show(record: dict[str, Any]) -> None:
    """Print a record of `measure`."""
    where = record["environment"]
    print(
        f"{record['model']}, batch {record['batch']}, {record['precision']}, {where['device']}, "
        f"{where['threads']} threads, torch {where['torch']}"
    )
    print(f"gradients agree in float64 to {record['gradient difference']:.1e} (largest relative difference)")
    print(f"{'':32}{'seconds':>10}{'min':>9}{'max':>9}{'of bound':>10}{'tensors MB':>12}{'peak MB':>9}")
    for name, t in record["seconds"].items():
        line = f"{name:32}{t['median']:10.4f}{t['min']:9.4f}{t['max']:9.4f}{record['bound'] / t['median']:10.0%}"
        memory = record["memory"].get(name)
        if memory:
            line += f"{memory['tensors'] / 1e6:12.0f}" + (f"{memory['peak'] / 1e6:9.0f}" if "peak" in memory else "")
        print(line)
    for layout, ratios in record["ratios"].items():
        print(f"{layout}: " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))


def main() -> None:
    """Measure and print; with --output also write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wrn-16-4")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    setting = Setting(options.model, options.batch, options.device, options.precision)
    if options.memory_of:
        name = options.memory_of
        small = contender(name, setting, 2)
        print(json.dumps(memory_of(contender(name, setting), small, setting.device)))
        return
    try:
        record = measure(setting, options.repetitions)
    except RuntimeError as error:
        sys.exit(str(error))
    show(record)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
