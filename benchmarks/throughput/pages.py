"""Writes the results of benchmarks/results into docs/benchmarks.md and README.md, between their markers.

    python -m benchmarks.throughput.pages

Run it after a measurement; nothing between `<!-- benchmarks: begin -->` and `<!-- benchmarks: end -->` is written by
hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import RESULTS
from benchmarks.measure import ROOT, time_text
from benchmarks.throughput.figures import best
from benchmarks.throughput.files import read
from benchmarks.throughput.tables import power_text, remark

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
NO_GPU = "Nothing has been measured on a GPU yet."
Record = Mapping[str, Any]


def results(folder: Path = RESULTS) -> dict[str, Record]:
    """Every file of throughput results there, those of `make gpu-check` among them, by its stem."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = read(path)
        except ValueError:
            continue  # of another benchmark
    return {stem: record for stem, record in found.items() if any(s["cases"] for s in record["sections"].values())}


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = "|---" + "|---:" * (len(header) - 1) + "|"
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _cases(record: Record) -> list[Record]:
    return [case for section in record["sections"].values() for case in section["cases"].values()]


def _threads(cases: Iterable[Record]) -> str:
    counts = sorted({case["environment"]["threads"] for case in cases})
    return "1 thread" if counts == [1] else f"{' or '.join(map(str, counts))} threads"


def _where(record: Record) -> str:
    env = _cases(record)[0]["environment"]
    threads = "" if "capability" in env else f", {_threads(_cases(record))}"
    return f"{env['device']}{threads}, torch {env['torch']}, Python {env['python']}"


def _measured(cases: Iterable[Record]) -> str:
    """When, at which commit, on how many threads."""
    found = {}
    for case in cases:
        env = case["environment"]
        found[f"{env['date']} at {(env['commit'] or '?')[:8]}, {_threads([case])}"] = None
    return f"Measured {'; '.join(found)}.\n"


def _notes(cases: Iterable[Record]) -> list[str]:
    return [f"**{note}**\n" for note in sorted({case["note"] for case in cases if "note" in case})]


def _on_gpu(record: Record) -> bool:
    return "capability" in _cases(record)[0]["environment"]


def _memory(contender: Record) -> str:
    held = contender.get("memory") or {}
    return f"{held['tensors'] / 1e6:.0f} MB" if "tensors" in held else ""


def contest_rows(case: Record) -> list[list[str]]:
    """Every contender in its faster memory format, then those that failed."""
    limit = case["limit"]
    counted = f"limit: {limit['operations'] / 1e9:.3g} GFLOP, {limit['bytes'] / 1e9:.2g} GB"
    of_products = f"{case['bound'] / limit['seconds']:.0%}"
    rows = [[counted, time_text(limit["seconds"]), of_products, "100%", *[""] * 4]]
    base = next((c["seconds"]["median"] for c in best(case).values() if c["kind"] == "theirs"), None)
    for name, c in best(case).items():
        t = c["seconds"]
        rows.append(
            [
                f"**{name}**" if c["kind"] == "ours" else name,
                f"{time_text(t['median'])} ({time_text(t['min'])} to {time_text(t['max'])})",
                f"{case['bound'] / t['median']:.0%}",
                f"{case['limit']['seconds'] / t['median']:.0%}",
                f"{base / t['median']:.2f}" if base and c["kind"] != "bound" else "",
                _memory(c),
                time_text(c["first"]) if "first" in c else "",
                remark(c),
            ]
        )
    failed = {full: c for full, c in case["contenders"].items() if "failed" in c}
    return rows + [[full, "failed", *[""] * 5, c["failed"].replace("|", "/")] for full, c in failed.items()]


def _contest(case: Record) -> list[str]:
    header = ["", "seconds", "of the products", "of the limit", "speed-up", "tensors", "first call", "difference"]
    return [f"{case['title']}:\n", *_table(header, contest_rows(case))]


def _autoattack(case: Record) -> list[str]:
    rows = []
    for model, ways in case["models"].items():
        base = ways.get("pyautoattack", {}).get("seconds")
        for way, found in ways.items():
            speed = f"{base / found['seconds']:.2f}" if base and found["seconds"] else ""
            rows.append([f"{model} training, {way}", f"{found['robust']:.2%}", f"{found['seconds']:.1f}", speed])
    absent = [f"{name} was left out: {why}.\n" for name, why in case["absent"].items()]
    return [f"{case['title']}:\n", *_table(["", "robust", "seconds", "speed-up"], rows), *absent]


def _scaling(axis: Record) -> list[str]:
    """The largest size and the slopes."""
    who = list(axis["slopes"])
    if not axis["points"]:
        return [f"{axis['title']}: nothing was measured: {axis['ended']}\n"]
    last = axis["points"][-1]
    rows = [
        [
            name,
            time_text(last["seconds"][name]["median"]),
            power_text(axis["slopes"][name]["seconds"]),
            f"{last['tensors'][name] / 1e6:.3g} MB",
            power_text(axis["slopes"][name]["tensors"]),
        ]
        for name in who
    ]
    first = axis["points"][0]["size"]
    head = f"{axis['title']}; {axis['unit']} from {first} to {last['size']} (ended by: {axis['ended']}):\n"
    return [head, *_table(["at the largest", "time", "slope", "tensors", "slope"], rows)]


def _energy(case: Record) -> list[str]:
    rows = []
    for name, found in case["methods"].items():
        costs = found["costs"]
        accuracies = [f"{100 * found[k]['value']:.1f} ± {100 * found[k]['error']:.1f}" for k in ("clean", "robust")]
        passes = [f"{costs[k]:,.0f}" for k in ("forwards", "backwards")]
        peak = f"{costs['peak_memory_bytes'] / 1e6:.0f} MB"
        rows.append([name, *accuracies, *passes, f"{costs['device_seconds']:.1f}", peak])
    header = ["", "clean %", "PGD-20 %", "forwards", "backwards", "device-seconds", "peak memory"]
    return [f"{case['title']}:\n", *_table(header, rows)]


def _parallel(case: Record) -> list[str]:
    rows = [
        [
            str(row["processes"]),
            f"{row['batch']} {row['of']}",
            row.get("failed") or f"{row['images per second']:.1f}",
            "" if "failed" in row else f"{row['efficiency']:.0%}",
        ]
        for row in case["rows"]
    ]
    return [f"{case['title']}:\n", *_table(["processes", "batch", "images per second", "efficiency"], rows)]


_WRITERS = {"contenders": _contest, "models": _autoattack, "points": _scaling, "methods": _energy, "rows": _parallel}


def case_lines(case: Record) -> list[str]:
    """A case as Markdown."""
    if "failed" in case:
        return [f"{case['title']}: failed: {case['failed']}\n"]
    return next(write for field, write in _WRITERS.items() if field in case)(case)


def docs(records: Mapping[str, Record], folder: Path = RESULTS) -> str:
    """The results of every device, section by section."""
    lines = [] if any(map(_on_gpu, records.values())) else [f"{NO_GPU}\n"]
    for stem, record in records.items():
        lines += [f"### {_where(record)}\n", *_notes(_cases(record))]
        lines += [f"Figures as JSON: [{stem}.json](../benchmarks/results/{stem}.json).\n"]
        for name, section in record["sections"].items():
            if not section["cases"]:
                continue
            lines += [f"#### {section['title']}\n", _measured(section["cases"].values())]
            for case in section["cases"].values():
                lines += case_lines(case)
            figure = f"{stem}-{name}.png"
            if (folder / figure).exists():
                lines += [f"![{section['title']}](../benchmarks/results/{figure})\n"]
    return "\n".join(lines).rstrip("\n")


def headline(records: Mapping[str, Record], folder: Path = RESULTS) -> str:
    """For each device the penalty, PGD-10 and the AT-EMR step: ours, the best of the others, the products alone."""
    lines = []
    for stem, record in records.items():
        rows, cases = [], []
        for name in ("penalty", "attacks", "training"):
            section = record["sections"].get(name, {"title": "", "cases": {}})
            for case in section["cases"].values():
                if "failed" in case:
                    continue
                row = _headline_row(section["title"], case)
                if row:
                    cases.append(case)
                    rows.append(row)
        if not rows:
            continue
        header = ["", "this library", "best of the others", "which", "times as fast", "of the products", "memory"]
        lines += [f"{_where(record)}:\n", *_notes(cases), *_table(header, rows)]
        figure = f"{stem}-training.png"
        if (folder / figure).exists():
            lines += [f"![The AT-EMR step](benchmarks/results/{figure})\n"]
    if not any(map(_on_gpu, records.values())):
        lines += [NO_GPU]
    return "\n".join(lines).rstrip("\n")


def _headline_row(title: str, case: Record) -> list[str] | None:
    found = best(case)
    mine = [c for c in found.values() if c["kind"] == "ours"]
    others = {name: c for name, c in found.items() if c["kind"] == "theirs"}
    if not mine or not others:
        return None
    ours = min(mine, key=lambda c: c["seconds"]["median"])
    name = min(others, key=lambda n: others[n]["seconds"]["median"])
    seconds, rival = ours["seconds"]["median"], others[name]["seconds"]["median"]
    held = [(c.get("memory") or {}).get("tensors") for c in (ours, others[name])]
    return [
        f"{title}: {case['title']}",
        _bold(time_text(seconds), seconds <= rival),
        _bold(time_text(rival), rival < seconds),
        name,
        f"{rival / seconds:.2f}",
        f"{case['bound'] / seconds:.0%}",
        f"{held[0] / held[1]:.2f}" if held[0] and held[1] else "",
    ]


def _bold(text: str, whether: bool) -> str:
    return f"**{text}**" if whether else text


def replaced(text: str, content: str) -> str:
    """`text` with `content` between the markers. Raises ValueError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def pages() -> dict[Path, str]:
    """Both pages as they should be."""
    records = results()
    wanted = {ROOT / "docs" / "benchmarks.md": docs(records), ROOT / "README.md": headline(records)}
    return {path: replaced(path.read_text(), content) for path, content in wanted.items()}


def main() -> None:
    """Write what has changed."""
    for path, text in pages().items():
        if path.read_text() != text:
            path.write_text(text)
            print(f"written: {path}")


if __name__ == "__main__":
    main()
