"""Tables between markers of a Markdown file; the text around them is written by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emr_training.checkpoint import write_atomically


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headers, rule, *rows))


def fill(path: Path, contents: Mapping[str, str]) -> None:
    """Put each text between <!-- NAME --> and <!-- /NAME --> of the file; the rest stays.

    Raises ValueError for a name without its two markers.
    """
    text = path.read_text(encoding="utf-8")
    for name, content in contents.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
        text, count = pattern.subn(lambda found, new=content: f"{found[1]}{new}\n{found[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{path} has {count} pairs of markers <!-- {name} --> ... <!-- /{name} -->; expected one")
    write_atomically(path, lambda file: file.write(text.encode()))


def percent(spread: Mapping[str, Any], digits: int = 1) -> str:
    """Mean ± standard deviation of fractions, in percent."""
    if spread["mean"] is None:
        return "-"
    std = "" if spread["std"] is None else f" ± {100 * spread['std']:.{digits}f}"
    return f"{100 * spread['mean']:.{digits}f}{std}"


def number(spread: Mapping[str, Any], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    if spread["mean"] is None:
        return "-"
    std = "" if spread["std"] is None else f" ± {spread['std']:.{max(1, digits - 1)}g}"
    return f"{spread['mean']:.{digits}g}{std}"
