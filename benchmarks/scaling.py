"""Time and peak memory against batch, depth, width, number of classes and resolution; with the slope.

    python -m benchmarks.scaling --axes batch depth --seconds 2

Along each axis a size grows step by step until the next step would take too long or does not fit: a call of the slowest
contender over `--seconds`, an error, or another answer than the reference's. The penalty with its parameter gradient
against double backward; along the classes effective margins against one backward pass for each class. Memory is the
largest sum of tensors alive at once over a call. The slope is the exponent: that of the straight line through the
larger half of the points, both axes logarithmic.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import margins, penalty
from benchmarks.contest import Contest, difference, reason
from benchmarks.measure import environment, interleaved, peak_of_tensors, write_json
from benchmarks.setting import Setting


@dataclass(frozen=True)
class Axis:
    """What grows, and the settings from tiny to large; the contest that is held at each."""

    sizes: Sequence[int]
    setting: Callable[[int], Setting]
    contest: Contest
    unit: str


def axes(device: str, precision: str) -> dict[str, Axis]:
    """Every axis; a GPU starts from a larger network."""
    large = device.startswith("cuda")
    base = Setting("wrn-16-4" if large else "wrn-10-1", 64 if large else 16, device, precision)
    width = int(base.model.rpartition("-")[2])
    depth = int(base.model.split("-")[1])
    cnn = base.with_(model="cnn", batch=64)
    return {
        "batch": Axis([2**k for k in range(13)], lambda n: base.with_(batch=n), penalty.CONTEST, "images"),
        "depth": Axis(range(10, 200, 12), lambda n: base.with_(model=f"wrn-{n}-{width}"), penalty.CONTEST, "layers"),
        "width": Axis(
            [2**k for k in range(7)],
            lambda n: base.with_(model=f"wrn-{depth}-{n}"),
            penalty.CONTEST,
            "times 16 channels",
        ),
        "resolution": Axis(
            [2**k for k in range(3, 10)], lambda n: base.with_(resolution=n), penalty.CONTEST, "pixels a side"
        ),
        "classes": Axis(
            [2, 5, 10, 20, 50, 100, 200, 500, 1000], lambda n: cnn.with_(classes=n), margins.CONTEST, "classes"
        ),
    }


def slope(points: Iterable[tuple[float, float]]) -> float | None:
    """The exponent k of y ~ x^k by least squares on logarithms, over the larger half of the points."""
    ordered = sorted(points)
    kept = [(math.log(x), math.log(y)) for x, y in ordered[len(ordered) // 2 :] if y > 0]
    if len(kept) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(kept) for column in zip(*kept, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in kept)
    return sum((x - mean_x) * (y - mean_y) for x, y in kept) / spread


def measure_axis(axis: Axis, seconds: float, repetitions: int, most: int | None = None) -> dict[str, Any]:
    """Points up to the largest that fits, why it ended there, and slopes."""
    layout = "channels_last"
    names = [axis.contest.reference, next(n for n, way in axis.contest.ways.items() if way.kind == "ours")]
    points: list[dict[str, Any]] = []
    ended = "the last size of the list"
    for size in list(axis.sizes)[:most]:
        setting = axis.setting(size)
        try:
            runners = {name: axis.contest.ways[name].make(setting, layout) for name in names}
            right, mine = (runners[name].answer(runners[name].step()) for name in names)
            gap = difference(mine, right)
            if not gap <= axis.contest.tolerance[setting.precision]:
                raise RuntimeError(f"another answer: {names[1]} differs by {gap:.1e}")
            del right, mine
            steps = {name: runner.step for name, runner in runners.items()}
            times = interleaved(steps, repetitions, setting.place)
            memory = {name: peak_of_tensors(step, setting.place) for name, step in steps.items()}
        except Exception as error:
            ended = f"{size} {axis.unit}: {reason(error)}"
            break
        points.append({"size": size, "seconds": times, "tensors": memory})
        slowest = max(t["median"] for t in times.values())
        if slowest > seconds:
            ended = f"a call over {seconds:g} s"
            break
    slopes = {
        name: {
            "seconds": slope((p["size"], p["seconds"][name]["median"]) for p in points),
            "tensors": slope((p["size"], p["tensors"][name]) for p in points),
        }
        for name in names
    }
    title = f"{axis.contest.title}, {axis.setting(axis.sizes[0]).title()} at first"
    return {"title": title, "unit": axis.unit, "points": points, "slopes": slopes, "ended": ended}


def measure(
    chosen: Sequence[str], device: str, precision: str, seconds: float, repetitions: int, most: int | None = None
) -> dict[str, Any]:
    """Every chosen axis."""
    every = axes(device, precision)
    return {name: measure_axis(every[name], seconds, repetitions, most) for name in chosen}


def main() -> None:
    """Measure and print; with --output also write JSON."""
    from benchmarks.throughput.tables import print_tables, scaling_tables

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(axes("cpu", "fp32"))
    parser.add_argument("--axes", nargs="+", choices=names, default=names)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a call, beyond which a size is the last")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = measure(options.axes, options.device, options.precision, options.seconds, options.repetitions)
    print_tables(scaling_tables(found))
    if options.output:
        where = environment(Setting("cnn", 1, options.device).place)
        write_json(options.output, {"axes": found, "environment": where})


if __name__ == "__main__":
    main()
