"""EMR penalty and its parameter gradient: emr_kernels, double backward, and the convolutions alone.

    python -m benchmarks.penalty --model wrn-16-4 --batch 64

The bound is the time of the same convolutions alone: two forwards, one data gradient and one weight gradient of each,
in the faster of the two memory formats. Times are medians of interleaved repetitions in one process. Memory is told
twice, each contender in a process of its own: the largest sum of tensors alive at once over the call (beyond those that
were there before it), which repeats to the byte, and the resident set's peak, with Python, torch and scratch memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.models import build
from emr_kernels import EffectiveWeightPenalty

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
TEMPERATURE = 1.0
Step = Callable[[], None]


def double_backward(model: nn.Module, x: torch.Tensor) -> Step:
    """The released EMR code's way: the effective weight with a graph, then backward through it."""
    model.eval()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        logits = model(leaf)
        mix = torch.softmax(logits / TEMPERATURE, 1).detach()
        (weight,) = torch.autograd.grad((mix * logits).sum() / len(x), leaf, create_graph=True)
        weight.square().sum().backward()

    return step


def linear_passes(model: nn.Module, x: torch.Tensor) -> Step:
    """emr_kernels."""
    model.eval()
    penalty = EffectiveWeightPenalty(model, temperature=TEMPERATURE, checks="never")
    penalty.prepare(x)
    assert penalty.engine == "linearized", penalty.engine_reason

    def step() -> None:
        model.zero_grad(set_to_none=True)
        penalty(x).backward()

    return step


def convolutions_alone(model: nn.Module, x: torch.Tensor, memory_format: torch.memory_format) -> Step:
    """Every convolution of the model, on tensors made before: two forwards, one data and one weight gradient."""
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int], list[int]]] = []

    def record(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        given = torch.randn_like(args[0]).contiguous(memory_format=memory_format)
        cotangent = torch.randn_like(output).contiguous(memory_format=memory_format)
        weight = module.weight.detach().contiguous(memory_format=memory_format)
        calls.append((given, weight, cotangent, list(module.stride), list(module.padding)))

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    convolution = torch.ops.aten.convolution.default
    gradient = torch.ops.aten.convolution_backward.default

    def step() -> None:
        with torch.no_grad():
            for given, weight, cotangent, stride, padding in calls:
                options = (stride, padding, [1, 1], False, [0, 0], 1)
                convolution(given, weight, None, *options)
                convolution(given, weight, None, *options)
                gradient(cotangent, given, weight, None, *options, [True, False, False])
                gradient(cotangent, given, weight, None, *options, [False, True, False])

    return step


def contender(name: str, model_name: str, batch: int) -> Step:
    """A timed step by name: "kernels", "double backward" or "convolutions", then the memory format."""
    kind, _, layout = name.partition(", ")
    memory_format = FORMATS[layout]
    model, shape = build(model_name)
    model = model.to(memory_format=memory_format)
    x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=memory_format)
    if kind == "convolutions":
        return convolutions_alone(model, x, memory_format)
    return (linear_passes if kind == "kernels" else double_backward)(model, x)


NAMES = [f"{kind}, {layout}" for kind in ("convolutions", "double backward", "kernels") for layout in FORMATS]


def check_agreement(model_name: str, batch: int) -> float:
    """Largest relative difference of a parameter's gradient between the two ways, in float64 on a small batch."""
    model, shape = build(model_name)
    model = model.double()
    x = torch.rand(min(batch, 4), *shape, dtype=torch.float64)
    gradients = []
    for way in (double_backward, linear_passes):
        way(model, x)()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None and p.grad.any()])
    assert len(gradients[0]) == len(gradients[1])
    return max(float((a - b).norm() / a.norm()) for a, b in zip(*gradients, strict=True))


def time_all(model_name: str, batch: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Seconds of each contender, from interleaved repetitions."""
    steps = {name: contender(name, model_name, batch) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for round_ in range(repetitions + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median": statistics.median(times), "min": min(times), "max": max(times)}
        for name, times in seconds.items()
    }


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def peak_of_tensors(step: Step) -> int:
    """Largest sum of the tensors that a call has alive at once, beyond those that were there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure_memory(name: str, model_name: str, batch: int) -> dict[str, int]:
    """Peak resident set of one call in this process, what was resident before it, and the peak of its tensors."""
    step = contender(name, model_name, batch)
    contender(name, model_name, 2)()  # code and thread pools that any first call loads
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return {"before": before, "peak": _status("VmHWM"), "tensors": peak_of_tensors(step)}


def memory_in_own_process(name: str, model_name: str, batch: int) -> dict[str, int]:
    """`measure_memory` in a fresh interpreter."""
    command = [sys.executable, "-m", "benchmarks.penalty", "--model", model_name, "--batch", str(batch)]
    run = subprocess.run([*command, "--memory-of", name], capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(run.stdout)
    return found


def main() -> None:
    """Measure and print; with --output also write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wrn-16-4")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of, options.model, options.batch)))
        return
    difference = check_agreement(options.model, options.batch)
    print(f"{options.model}, batch {options.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"gradients agree in float64 to {difference:.1e} (largest relative difference of a parameter)")
    if difference > 1e-10:
        sys.exit("the contenders do not compute the same gradient: nothing is timed")
    times = time_all(options.model, options.batch, options.repetitions)
    bound = min(times[f"convolutions, {layout}"]["median"] for layout in FORMATS)
    memory = {name: memory_in_own_process(name, options.model, options.batch) for name in NAMES if "conv" not in name}
    print(f"{'':32}{'seconds':>9}{'min':>8}{'max':>8}{'of bound':>10}{'tensors MB':>12}{'peak MB':>9}")
    for name, t in times.items():
        line = f"{name:32}{t['median']:9.3f}{t['min']:8.3f}{t['max']:8.3f}{bound / t['median']:10.0%}"
        if name in memory:
            line += f"{memory[name]['tensors'] / 1e6:12.0f}{memory[name]['peak'] / 1e6:9.0f}"
        print(line)
    ratios: dict[str, dict[str, float]] = {}
    for layout in FORMATS:
        ours, theirs = f"kernels, {layout}", f"double backward, {layout}"
        grown = {name: memory[name]["peak"] - memory[name]["before"] for name in (ours, theirs)}
        ratios[layout] = {
            "speed-up over double backward": times[theirs]["median"] / times[ours]["median"],
            "fraction of the bound": bound / times[ours]["median"],
            "tensor memory over double backward's": memory[ours]["tensors"] / memory[theirs]["tensors"],
            "peak memory over double backward's": memory[ours]["peak"] / memory[theirs]["peak"],
            "grown resident set over double backward's": grown[ours] / grown[theirs],
        }
        print(f"{layout}: " + ", ".join(f"{name} {value:.2f}" for name, value in ratios[layout].items()))
    if options.output:
        record = {
            "model": options.model,
            "batch": options.batch,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "gradient difference": difference,
            "seconds": times,
            "memory": memory,
            "ratios": ratios,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
