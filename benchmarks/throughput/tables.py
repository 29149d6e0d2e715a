"""Records as tables of rich."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measure import time_text


def print_tables(tables: Iterable[Table]) -> None:
    """To the terminal, or at a readable width into a file."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    for table in tables:
        console.print(table)
        console.print()


def new_table(title: str, columns: Iterable[str], caption: str | None = None) -> Table:
    """An empty table whose first column is text and the others numbers."""
    table = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left",
        title_style="bold", padding=(0, 1, 0, 0),
    )  # fmt: skip
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
    return table


def reference_of(record: Mapping[str, Any]) -> float | None:
    """Seconds of the reference in its best form."""
    prefix = next(name for name, c in record["contenders"].items() if c["kind"] != "bound").rpartition(", ")[0]
    times = [
        c["seconds"]["median"]
        for name, c in record["contenders"].items()
        if c["kind"] != "bound" and name.rpartition(", ")[0] == prefix and "seconds" in c
    ]
    return min(times) if times else None


def remark(contender: Mapping[str, Any]) -> str:
    """Why it failed, or how far its answer is from the reference's."""
    if "failed" in contender:
        return str(contender["failed"])
    told = contender.get("difference")
    if told is None:
        return ""
    return f"approximate, {told:.0e}" if contender["kind"] == "approximate" else f"{told:.0e}"


def contest_table(title: str, record: Mapping[str, Any]) -> Table:
    """One row a contender; failed ones with their reasons."""
    limit, ceilings = record["limit"], record["ceilings"]
    rate = max(ceilings["matmul"], ceilings["convolution"])
    caption = (
        f"limit {time_text(limit['seconds'])}: {limit['operations'] / 1e9:.3g} GFLOP at {rate / 1e9:.3g} GFLOP/s, "
        f"{limit['bytes'] / 1e9:.2g} GB at {ceilings['copy'] / 1e9:.3g} GB/s; speed-up over the reference's best form"
    )
    if "float64 difference" in record:
        caption += f"; in float64 ours differs by {record['float64 difference']:.0e}"
    columns = ("", "median", "min", "max", "of bound", "of limit", "speed-up", "tensors", "peak", "first", "difference")
    table = new_table(f"{title}: {record['title']}", columns, caption)
    table.add_row(
        "limit", time_text(limit["seconds"]), "", "", f"{record['bound'] / limit['seconds']:.0%}", "100%", style="dim"
    )
    base = reference_of(record)
    for name, c in record["contenders"].items():
        if "seconds" not in c:
            table.add_row(name, "failed", *[""] * 8, remark(c))
            continue
        t, memory = c["seconds"], c.get("memory") or {}
        mega = [f"{memory[kind] / 1e6:.0f} MB" if kind in memory else "" for kind in ("tensors", "peak")]
        table.add_row(
            name,
            *(time_text(t[kind]) for kind in ("median", "min", "max")),
            f"{record['bound'] / t['median']:.0%}",
            f"{limit['seconds'] / t['median']:.0%}",
            f"{base / t['median']:.2f}" if base and c["kind"] != "bound" else "",
            *mega,
            time_text(c["first"]) if "first" in c else "",
            remark(c),
            style="bold" if c["kind"] == "ours" else "dim" if c["kind"] == "bound" else "",
        )
    return table


def autoattack_table(record: Mapping[str, Any]) -> Table:
    """One row a network and contender."""
    caption = "; ".join(f"{name} was left out: {why}" for name, why in record["absent"].items()) or None
    columns = ("", "robust", "seconds", "of the processor", "speed-up")
    table = new_table(f"AutoAttack: {record['title']}", columns, caption)
    for model, ways in record["models"].items():
        base = next(iter(ways.values()))["seconds"] if "pyautoattack" in ways else None
        for way, found in ways.items():
            table.add_row(
                f"{model} training, {way}",
                f"{found['robust']:.2%}",
                f"{found['seconds']:.1f}",
                f"{found['processor']:.1f}",
                f"{base / found['seconds']:.2f}" if base else "",
            )
    return table


def scaling_tables(axes: Mapping[str, Any]) -> list[Table]:
    """One table an axis: a row a size, a column for each contender's time and memory."""
    tables = []
    for name, axis in axes.items():
        contenders = list(axis["slopes"])
        exponents = "; ".join(
            f"{who}: time ~ {name}^{power_text(s['seconds'])}, memory ~ {name}^{power_text(s['tensors'])}"
            for who, s in axis["slopes"].items()
        )
        columns = [axis["unit"], *contenders, *(f"{who}, tensors" for who in contenders)]
        table = new_table(f"{name}: {axis['title']}", columns, f"{exponents}. Ended: {axis['ended']}")
        for point in axis["points"]:
            times = [time_text(point["seconds"][who]["median"]) for who in contenders]
            table.add_row(str(point["size"]), *times, *(f"{point['tensors'][who] / 1e6:.3g} MB" for who in contenders))
        tables.append(table)
    return tables


def power_text(exponent: float | None) -> str:
    """An exponent; "?" where too few sizes tell."""
    return "?" if exponent is None else f"{exponent:.2f}"


def energy_table(record: Mapping[str, Any]) -> Table:
    """One row a method: what it costs beside what it gives."""
    columns = ("", "clean %", "PGD-20 %", "forwards", "backwards", "device-seconds", "peak")
    table = new_table(f"Cost of robustness: {record['title']}", columns)
    for name, found in record["methods"].items():
        costs = found["costs"]
        accuracies = [f"{100 * found[k]['value']:.1f} ± {100 * found[k]['error']:.1f}" for k in ("clean", "robust")]
        table.add_row(
            name,
            *accuracies,
            f"{costs['forwards']:,.0f}",
            f"{costs['backwards']:,.0f}",
            f"{costs['device_seconds']:.1f}",
            f"{costs['peak_memory_bytes'] / 1e6:.0f} MB",
        )
    return table


def parallel_table(record: Mapping[str, Any]) -> Table:
    """One row a number of processes."""
    table = new_table(f"Data parallel: {record['title']}", ("processes", "batch", "images/s", "efficiency"))
    for row in record["rows"]:
        batch = f"{row['batch']} {row['of']}"
        if "failed" in row:
            table.add_row(str(row["processes"]), batch, "failed", row["failed"])
        else:
            table.add_row(str(row["processes"]), batch, f"{row['images per second']:.1f}", f"{row['efficiency']:.0%}")
    return table
