"""Means over seeds, and rank correlations with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation of those there are (None for too few), and the values themselves."""
    known = np.asarray([value for value in values if value is not None], dtype=float)
    return {
        "mean": float(known.mean()) if len(known) else None,
        "std": float(known.std(ddof=1)) if len(known) > 1 else None,
        "values": list(values),
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where one of both does not vary."""
    x, y = _ranks(np.asarray(a, dtype=float)), _ranks(np.asarray(b, dtype=float))
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def bootstrapped(
    a: Sequence[float], b: Sequence[float], groups: Sequence[str], *, draws: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Spearman's correlation with a 95% percentile interval from resampling whole groups.

    groups: the configuration of each model. Seeds of one configuration are no independent models, so that drawing
    models one by one would make the interval too narrow.
    """
    x, y, names = np.asarray(a, dtype=float), np.asarray(b, dtype=float), np.asarray(groups)
    members = [np.flatnonzero(names == name) for name in np.unique(names)]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        rows = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        value = spearman(x[rows].tolist(), y[rows].tolist())
        if value is not None:
            found.append(value)
    low, high = np.percentile(found, [2.5, 97.5]).tolist() if found else (None, None)
    return {"rho": spearman(a, b), "low95": low, "high95": high, "models": len(x), "configurations": len(members)}


def paired(a: Sequence[float | None], b: Sequence[float | None]) -> dict[str, Any]:
    """The differences b - a of runs with equal seeds, and in how many of them b is the larger."""
    pairs = zip(a, b, strict=True)
    differences = [after - before for before, after in pairs if before is not None and after is not None]
    return {**spread(differences), "larger": sum(d > 0 for d in differences), "of": len(differences)}


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
