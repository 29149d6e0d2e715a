"""Where the time of a training step goes, kernel by kernel, and which part is whose."""

from __future__ import annotations

import re
import time
from pathlib import Path

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks import training
from benchmarks.measure import synchronize, time_text
from benchmarks.setting import Setting
from benchmarks.throughput.tables import new_table

_OURS = re.compile(r"emr|PenaltyFunction|RobustLoss")
_LIBRARY = re.compile(
    r"mkldnn|convolution|aten::(mm|addmm|bmm|baddbmm|linear)\b|cudnn|cutlass|xmma|gemm|wgrad|dgrad|fprop|nchwToNhwc"
    r"|nhwcToNchw|winograd",
    re.IGNORECASE,
)
GROUPS = ("ours", "convolutions and products", "the rest", "gaps")
_SHOWN = 25


def triton_kernels() -> frozenset[str]:
    """Names of our Triton kernels, which say nothing of whose they are."""
    try:
        from emr_kernels import triton
    except ImportError:
        return frozenset()
    modules = [module for module in vars(triton).values() if type(module).__name__ == "module"]
    return frozenset(
        name for module in modules for name, value in vars(module).items() if type(value).__name__ == "JITFunction"
    )


def group_of(name: str, ours: frozenset[str] = frozenset()) -> str:
    """Whose a kernel or operator is."""
    if _OURS.search(name) or name in ours:
        return GROUPS[0]
    return GROUPS[1] if _LIBRARY.search(name) else GROUPS[2]


def profile_step(setting: Setting, folder: Path, layout: str = "channels_last") -> Table:
    """Trace emr_training's third step, save the trace, and tell where its time went.

    On a GPU times are those of kernels, and gaps what the device idled; on a CPU those of operators without the ones
    they call, and gaps what is between them, Python above all. The trace opens in chrome://tracing or Perfetto.
    """
    device = setting.place
    runner = training.ours(setting, layout)
    for _ in range(2):
        runner.step()
    synchronize(device)
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as recorded:
        begin = time.perf_counter()
        runner.step()
        synchronize(device)
        wall = time.perf_counter() - begin
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"trace-{setting.model}-{setting.batch}-{setting.precision}.json"
    recorded.export_chrome_trace(str(trace))
    seconds: dict[str, tuple[float, int]] = {}
    for event in recorded.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        taken = event.self_device_time_total if gpu and on_device else event.self_cpu_time_total if not gpu else 0
        if taken:
            seconds[event.key] = (taken / 1e6, event.count)
    ours = triton_kernels()
    split = dict.fromkeys(GROUPS, 0.0)
    for name, (taken, _) in seconds.items():
        split[group_of(name, ours)] += taken
    split["gaps"] = max(0.0, wall - sum(split.values()))
    told = ", ".join(f"{name} {taken / wall:.0%}" for name, taken in split.items())
    table = new_table(
        f"AT-EMR step of emr_training, {setting.title()}, {layout}: {time_text(wall)} under the profiler",
        ("", "whose", "time", "part", "calls"),
        f"{told}. Trace: {trace}",
    )
    for name, (taken, count) in sorted(seconds.items(), key=lambda item: -item[1][0])[:_SHOWN]:
        table.add_row(name[:70], group_of(name, ours), time_text(taken), f"{taken / wall:.1%}", str(count))
    return table
