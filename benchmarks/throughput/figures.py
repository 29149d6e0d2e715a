"""Figures of a file of the throughput benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.contest import BOUND
from emr_training.reporting.figures import INK, PALETTE

_COLORS = {"ours": PALETTE[0], "theirs": PALETTE[5], "approximate": PALETTE[3], "bound": PALETTE[6]}
_LEGEND = {"ours": "this library", "theirs": "others", "approximate": "another answer", "bound": "products alone"}


def _clean(ax: Axes, grid: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(colors=INK, length=3, labelsize=8)
    ax.grid(axis=grid, color="#E6E6E6", linewidth=0.8)
    ax.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
    return path


def _where(environment: Mapping[str, Any]) -> str:
    threads = "1 thread" if environment["threads"] == 1 else f"{environment['threads']} threads"
    return f"{environment['device']}, {threads}, torch {environment['torch']}"


def best(case: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of every contender the faster memory format, by its name without it; failed ones are left out."""
    found: dict[str, dict[str, Any]] = {}
    for full, contender in case["contenders"].items():
        name = full.rpartition(", ")[0]
        if "seconds" not in contender or "failed" in contender:
            continue
        if name not in found or contender["seconds"]["median"] < found[name]["seconds"]["median"]:
            found[name] = {**contender, "layout": full.rpartition(", ")[2]}
    return found


def contest_figure(path: Path, title: str, cases: Mapping[str, Any]) -> Path:
    """One panel a case: a bar for each contender in its faster memory format, the products alone as a line."""
    panels = {name: case for name, case in cases.items() if "contenders" in case}
    heights = [len(best(case)) for case in panels.values()]
    figure = Figure(figsize=(8, sum(0.28 * h + 0.75 for h in heights)))
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    kinds: set[str] = set()
    for ax, case in zip(axes, panels.values(), strict=True):
        bars = {name: c for name, c in reversed(best(case).items()) if name != BOUND}
        kinds |= {c["kind"] for c in bars.values()} | {"bound"}
        values = [c["seconds"]["median"] for c in bars.values()]
        low = [v - c["seconds"]["min"] for v, c in zip(values, bars.values(), strict=True)]
        high = [c["seconds"]["max"] - v for v, c in zip(values, bars.values(), strict=True)]
        ax.barh(range(len(bars)), values, 0.7, color=[_COLORS[c["kind"]] for c in bars.values()])
        ax.errorbar(values, range(len(bars)), xerr=[low, high], fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
        # One disturbed repetition should not squeeze the bars.
        end = min(max(v + h for v, h in zip(values, high, strict=True)), 1.4 * max(values))
        for row, (value, up) in enumerate(zip(values, high, strict=True)):
            told = f"{case['bound'] / value:.0%}"
            blank = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the line of a spread that goes on
            place = (min(value + up, end), row)
            ax.annotate(told, place, (6, 0), textcoords="offset points", va="center", fontsize=8, color=INK, bbox=blank)
        ax.axvline(case["bound"], color=_COLORS["bound"], linewidth=1.5, linestyle="--")
        ax.set_yticks(range(len(bars)), list(bars))
        ax.set_title(case["title"], fontsize=9, color=INK, loc="left")
        ax.set_xlim(0, 1.12 * max(end, case["bound"]))
        _clean(ax, "x")
    axes[-1].set_xlabel("Seconds: median, least and greatest; percent: of the products alone", fontsize=8, color=INK)
    handles = [
        *(
            figure.axes[0].barh(0, 0, color=_COLORS[k], label=_LEGEND[k])
            for k in _LEGEND
            if k in kinds and k != "bound"
        ),
        figure.axes[0].axvline(float("nan"), color=_COLORS["bound"], linestyle="--", label=_LEGEND["bound"]),
    ]
    figure.tight_layout()
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, frameon=False, fontsize=8)
    last = list(panels.values())[-1]["environment"]
    figure.suptitle(f"{title}\n{_where(last)}", fontsize=10, color=INK, y=1.0, va="bottom")
    return _save(figure, path)


def _apart(sizes: Sequence[int]) -> list[int]:
    """Those whose labels have room on a logarithmic axis, from the largest down."""
    room = (sizes[-1] / sizes[0]) ** (1 / 12)
    told = [sizes[-1]]
    for size in reversed(sizes[:-1]):
        if told[-1] >= size * room:
            told.append(size)
    return told[::-1]


def scaling_figure(path: Path, axes: Mapping[str, Any]) -> Path:
    """Time above, memory below, a column for each axis; the slope in the legend."""
    drawn = {name: axis for name, axis in axes.items() if axis.get("points")}
    figure = Figure(figsize=(3.2 * len(drawn), 6))
    grid = figure.subplots(2, len(drawn), squeeze=False)
    for column, (name, axis) in enumerate(drawn.items()):
        sizes = [p["size"] for p in axis["points"]]
        for row, quantity in enumerate(("seconds", "tensors")):
            ax = grid[row][column]
            for who, slopes in axis["slopes"].items():
                values = [p[quantity][who]["median"] if row == 0 else p[quantity][who] / 1e6 for p in axis["points"]]
                power = slopes[quantity]
                label = who if power is None else f"{who}: slope {power:.2f}"
                color = _COLORS["ours"] if who == "emr_kernels" else _COLORS["theirs"]
                ax.loglog(sizes, values, marker="o", markersize=3.5, linewidth=1.6, color=color, label=label)
            ax.legend(frameon=False, fontsize=7, labelcolor=INK)
            ax.minorticks_off()
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if max(values) < 30 * min(values) else (1.0,)))
            ax.yaxis.set_major_formatter("{x:g}")
            told = _apart(sizes)
            ax.set_xticks(told, [str(size) for size in told], rotation=90 if len(told) > 6 else 0)
            _clean(ax, "both")
        grid[0][column].set_title(name, fontsize=10, color=INK)
        grid[1][column].set_xlabel(axis["unit"], fontsize=8, color=INK)
    grid[0][0].set_ylabel("Seconds of a call", fontsize=8, color=INK)
    grid[1][0].set_ylabel("Tensors alive at once, MB", fontsize=8, color=INK)
    figure.tight_layout()
    where = _where(next(iter(drawn.values()))["environment"])
    told = "Penalty and gradient; along the classes effective margins"
    figure.suptitle(f"Scaling: {told}\n{where}", fontsize=10, color=INK, y=1.0, va="bottom")
    return _save(figure, path)


def bars_figure(
    path: Path, title: str, label: str, bars: Mapping[str, float], notes: Mapping[str, str], theirs: Sequence[str] = ()
) -> Path:
    """One bar a row, with a note at its end; `theirs` are not this library's."""
    figure = Figure(figsize=(8, 0.32 * len(bars) + 1.1))
    ax = figure.subplots()
    names = list(reversed(bars))
    ax.barh(
        names,
        [bars[n] for n in names],
        0.65,
        color=[_COLORS["theirs" if n in theirs else "ours"] for n in names],
    )
    for row, name in enumerate(names):
        ax.text(bars[name], row, f"  {notes[name]}", va="center", fontsize=8, color=INK)
    ax.margins(x=0.3)
    ax.set_xlim(left=0)
    ax.set_xlabel(label, fontsize=8, color=INK)
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    _clean(ax, "x")
    return _save(figure, path)


def draw(record: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """A figure for every section that has something to draw."""
    drawn = []
    for name, section in record["sections"].items():
        cases = {identity: case for identity, case in section["cases"].items() if "failed" not in case}
        path = folder / f"{stem}-{name}.png"
        if any("contenders" in case for case in cases.values()):
            drawn.append(contest_figure(path, section["title"], cases))
        elif any(case.get("points") for case in cases.values()):
            drawn.append(scaling_figure(path, cases))
        elif cases:
            drawn.append(_bars(path, name, section["title"], cases))
    return drawn


def _bars(path: Path, name: str, title: str, cases: Mapping[str, Any]) -> Path:
    """The cases below each other; told apart by their names where there are several."""
    bars: dict[str, float] = {}
    notes: dict[str, str] = {}
    for identity, case in cases.items():
        apart = f"{identity}, " if len(cases) > 1 else ""
        for row, value, note in _ROWS[name](case):
            bars[apart + row], notes[apart + row] = value, note
    *_, last = cases.values()
    subject = f"{last['title']}\n" if len(cases) == 1 else ""
    label = {"autoattack": "Seconds", "energy": "Device-seconds of training", "parallel": "Images per second"}[name]
    theirs = [row for row in bars if "pyautoattack" in row or row.endswith("AT")]
    return bars_figure(path, f"{title}: {subject}{_where(last['environment'])}", label, bars, notes, theirs)


def _autoattack_rows(case: Mapping[str, Any]) -> Iterator[tuple[str, float, str]]:
    for model, ways in case["models"].items():
        for way, found in ways.items():
            yield f"{model}, {way}", found["seconds"], f"{found['robust']:.1%} robust"


def _energy_rows(case: Mapping[str, Any]) -> Iterator[tuple[str, float, str]]:
    for method, found in case["methods"].items():
        note = f"PGD-20 {found['robust']['value']:.1%}, clean {found['clean']['value']:.1%}"
        yield method, found["costs"]["device_seconds"], note


def _parallel_rows(case: Mapping[str, Any]) -> Iterator[tuple[str, float, str]]:
    for row in case["rows"]:
        processes = "1 process" if row["processes"] == 1 else f"{row['processes']} processes"
        note = row["failed"] if "failed" in row else f"efficiency {row['efficiency']:.0%}"
        yield f"{processes}, {row['batch']} {row['of']}", row.get("images per second", 0.0), note


#: By section: a bar's name, its length and what is told at its end.
_ROWS: dict[str, Callable[[Mapping[str, Any]], Iterator[tuple[str, float, str]]]] = {
    "autoattack": _autoattack_rows,
    "energy": _energy_rows,
    "parallel": _parallel_rows,
}
