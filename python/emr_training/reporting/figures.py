"""Figures of results as PNG files. A method has the same colour and line in every figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from emr_training.checkpoint import write_atomically
from emr_training.evaluation import Accuracy, Evaluation
from emr_training.evaluation.names import epsilon_text, label
from emr_training.evaluation.result import attack_rows
from emr_training.training.metrics import EpochMetrics


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    color: str
    line: str


# Okabe and Ito's colours, safe for colour-blind readers: warm for training on clean images, blue for
# adversarial training; dashed without EMR, solid with it.
STYLES = {
    "Standard": Style("#E69F00", "--"),
    "EMR": Style("#D55E00", "-"),
    "AT": Style("#56B4E9", "--"),
    "AT-EMR": Style("#0072B2", "-"),
}
#: Of other methods than these, in the order of their rows.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C8C8C", "#222222")
INK = "#333333"


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """How each method is drawn: as in STYLES if all are there, else solid in the palette's colours."""
    names = list(methods)
    if all(name in STYLES for name in names):
        return {name: STYLES[name] for name in names}
    return {name: Style(PALETTE[i % len(PALETTE)], "-") for i, name in enumerate(names)}


def margin_distributions(path: Path, margins: Mapping[str, Tensor], subtitle: str, norm: str = "L2") -> None:
    """Save the density of each method's signed effective margins [N], distances in `norm`, in panels on one axis."""
    margins = {method: values[values.isfinite()] for method, values in margins.items()}
    drawn = styles(margins)
    low = min(float(m.quantile(0.002)) for m in margins.values())
    high = max(float(m.quantile(0.998)) for m in margins.values())
    grid = np.linspace(low - 0.05, high + 0.05, 400)
    figure = Figure(figsize=(8, 1.25 * len(margins) + 1.5))
    axes = figure.subplots(len(margins), 1, sharex=True, sharey=True)
    for ax, (method, values) in zip(np.atleast_1d(axes), margins.items(), strict=True):
        style = drawn[method]
        height = _density(values.double().numpy(), grid)
        median = float(values.median())
        wrong = float((values < 0).double().mean())
        ax.fill_between(grid, height, color=style.color, alpha=0.25, linewidth=0)
        ax.plot(grid, height, color=style.color, linewidth=2, linestyle=style.line)
        ax.axvline(median, color=style.color, linewidth=1.5)
        ax.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        place: dict[str, Any] = {"transform": ax.transAxes, "color": INK, "linespacing": 1.4}
        ax.text(1.02, 0.62, method, va="bottom", fontweight="bold", **place)
        ax.text(1.02, 0.58, f"median {median:.2f}\nmisclassified {100 * wrong:.1f}%", va="top", **place)
        ax.set_yticks([])
        clean_axes(ax, left=False)
    ax.set_xlabel(f"Effective margin: first-order {norm} distance to the decision boundary, in [0, 1] pixel units")
    figure.supylabel("Density of test samples", fontsize=10, color=INK)
    set_title(figure, "Effective margins", subtitle)
    save_figure(figure, path)


def accuracy_curves(
    path: Path, curves: Mapping[str, Sequence[tuple[float, Accuracy]]], marked: Sequence[float], subtitle: str
) -> None:
    """Save robust accuracy against epsilon for each method, with a band of one binomial standard error.

    The epsilons in `marked` get a vertical line.
    """
    figure = Figure(figsize=(8, 4.6))
    ax = figure.subplots()
    for epsilon in marked:
        ax.axvline(epsilon, color="#BBBBBB", linewidth=0.9, linestyle=":")
    for method, curve in curves.items():
        style = STYLES[method]
        epsilons = np.array([epsilon for epsilon, _ in curve])
        values = np.array([accuracy.value for _, accuracy in curve])
        errors = np.array([accuracy.standard_error for _, accuracy in curve])
        ax.fill_between(epsilons, values - errors, values + errors, color=style.color, alpha=0.18, linewidth=0)
        ax.plot(
            epsilons,
            values,
            color=style.color,
            linewidth=2,
            linestyle=style.line,
            label=method,
            clip_on=False,
        )
    ax.set_ylim(0, 1.02)
    ax.set_xlim(0, max(curve[-1][0] for curve in curves.values()))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("Radius ε of the L∞ ball, in [0, 1] pixel units")
    ax.set_ylabel("Robust accuracy on the test split")
    side_legend(ax)
    clean_axes(ax)
    set_title(figure, "Robust accuracy against attack strength", subtitle)
    save_figure(figure, path)


def accuracy_bars(path: Path, evaluations: Mapping[str, Evaluation], subtitle: str) -> None:
    """Save a group of bars for the clean accuracy and for each attack, one bar a method, with 95% intervals.

    Where a radius has several attacks, their worst case has a group, too. A method without an attack has no bar there.
    """
    groups: dict[str, list[Accuracy | None]] = {"clean": [e.clean for e in evaluations.values()]}
    for name, epsilon, found in attack_rows(list(evaluations.values())):
        groups[f"{label(name)}\nε = {epsilon_text(epsilon)}"] = found
    width = 0.8 / len(evaluations)
    figure = Figure(
        figsize=(max(6.0, 1.5 + len(groups) * max(0.9, 0.3 * len(evaluations))), 4.2 + 0.25 * len(evaluations))
    )
    ax = figure.subplots()
    for row, (method, style) in enumerate(styles(evaluations).items()):
        drawn = [(i, found[row]) for i, found in enumerate(groups.values())]
        shown = [(i, accuracy) for i, accuracy in drawn if accuracy is not None]
        values = np.array([accuracy.value for _, accuracy in shown])
        bounds = np.array([accuracy.interval() for _, accuracy in shown])
        places = np.array([i for i, _ in shown]) + (row - (len(evaluations) - 1) / 2) * width
        ax.bar(places, values, width * 0.9, color=style.color, alpha=0.85, label=method)
        ax.errorbar(
            places,
            values,
            np.abs(bounds.T - values),
            fmt="none",
            ecolor=INK,
            elinewidth=1,
            capsize=2,
        )
    ax.set_xticks(range(len(groups)), list(groups))
    ax.set_ylim(0, 1.0)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_ylabel("Accuracy")
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.14), frameon=False, labelcolor=INK)
    clean_axes(ax)
    ax.tick_params(axis="x", length=0)
    set_title(figure, "Clean and robust accuracy", subtitle)
    save_figure(figure, path)


def training_curves(path: Path, histories: Mapping[str, Sequence[EpochMetrics]], subtitle: str) -> None:
    """Save each method's cross-entropy and its clean and robust validation accuracies, by epoch."""
    figure = Figure(figsize=(12, 4.2))
    loss, clean, robust = figure.subplots(1, 3)
    for method, history in histories.items():
        style: dict[str, Any] = {
            "color": STYLES[method].color,
            "linestyle": STYLES[method].line,
            "linewidth": 1.8,
            "label": method,
        }
        epochs = [metrics.epoch for metrics in history]
        loss.plot(epochs, [metrics.losses["cross_entropy"] for metrics in history], **style)
        clean.plot(epochs, [metrics.validation_accuracy for metrics in history], **style)
        robust.plot(epochs, [metrics.validation_robust_accuracy for metrics in history], **style)
    loss.set_yscale("log")
    loss.set_title("Training cross-entropy, nats")
    clean.set_title("Validation accuracy, clean")
    robust.set_title("Validation accuracy, PGD-10")
    for ax in (loss, clean, robust):
        ax.set_xlabel("Epoch")
        ax.title.set_fontsize(10.5)
        ax.title.set_color(INK)
        clean_axes(ax)
    for ax in (clean, robust):
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set_ylim(top=1.0)
    side_legend(robust)
    set_title(figure, "Training", subtitle)
    save_figure(figure, path)


def _density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density of `values` on `grid`, with Silverman's bandwidth."""
    spread = min(values.std(), np.subtract(*np.percentile(values, [75, 25])) / 1.34) or 1e-3
    bandwidth = 0.9 * spread * len(values) ** -0.2
    kernel = np.exp(-0.5 * ((grid[:, None] - values[None]) / bandwidth) ** 2)
    return np.asarray(kernel.mean(1) / (bandwidth * np.sqrt(2 * np.pi)))


def clean_axes(ax: Axes, left: bool = True) -> None:
    """Take away what carries no number; left: whether there is an axis on the left."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines["left"].set_visible(left)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(colors=INK, length=3)
    ax.xaxis.label.set_color(INK)
    ax.yaxis.label.set_color(INK)
    if left:
        ax.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    ax.set_axisbelow(True)


def side_legend(ax: Axes) -> None:
    """A legend to the right of the axes."""
    ax.legend(
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        frameon=False,
        handlelength=2.4,
        labelspacing=0.9,
        labelcolor=INK,
    )


def set_title(figure: Figure, title: str, subtitle: str) -> None:
    """Write a title and a subtitle above the axes; call it last, when the layout is settled."""
    figure.tight_layout()
    inch = 1 / figure.get_size_inches()[1]
    figure.text(0.01, 1 + 0.38 * inch, title, va="bottom", fontsize=13, fontweight="bold", color=INK)
    figure.text(0.01, 1 + 0.28 * inch, subtitle, va="top", fontsize=9.5, color="#666666")


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure to `path` as PNG, whole or not at all."""
    FigureCanvasAgg(figure)
    write_atomically(
        path, lambda file: figure.savefig(file, format="png", dpi=160, bbox_inches="tight", facecolor="white")
    )
