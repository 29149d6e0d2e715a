"""The figures, from the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from emr_training.reporting import margin_distributions
from emr_training.reporting.figures import INK, PALETTE, clean_axes, save_figure, set_title
from experiments.jobs import read
from experiments.mnist import measure
from experiments.mnist.diagnosis import diagnosis
from experiments.mnist.plan import Choices, Plan
from experiments.mnist.results import QUANTITIES

#: Colours of what a model was trained with; filled markers have EMR.
_COLORS = {"standard": PALETTE[1], "at": PALETTE[0], "trades": PALETTE[2]}
_MARKERS = {"mlp": "o", "mlp-bn": "s", "cnn": "^", "cnn-bn": "D"}


def draw(folder: Path, plan: Plan, choices: Choices, results: Mapping[str, Any], points: Mapping[float, Any]) -> None:
    """Write every figure that there are results for."""
    for net in plan.settings.final_nets:
        _accuracies(folder / f"accuracy_{net}.png", _of(results["final"], net), net)
        _margins(folder / f"margins_{net}.png", plan, choices, net)
        _surfaces(folder / f"surface_{net}.png", plan, choices, net)
    if results["ablation"]:
        _ablation(folder / "ablation.png", results)
    if results["masking"]["models"]:
        _curves(folder / "curves.png", plan, results["masking"]["models"])
    drawn = {epsilon: found for epsilon, found in points.items() if len(found) > 2}
    if drawn:
        _prediction(folder / "predict.png", drawn, results["predict"])


def _of(final: Mapping[str, Any], net: str) -> dict[str, Any]:
    """One net's methods, without its name."""
    return {title.removeprefix(f"{net} "): found for title, found in final.items() if title.startswith(f"{net} ")}


def _accuracies(path: Path, final: Mapping[str, Any], net: str) -> None:
    """A panel for clean accuracy and for each radius; a row for each method, a dot for each seed."""
    if not final:
        return
    radii = sorted({radius for found in final.values() for radius in found["autoattack"]})
    figure = Figure(figsize=(3.0 * (1 + len(radii)) + 1.5, 0.32 * len(final) + 1.2))
    axes = figure.subplots(1, 1 + len(radii), sharey=True)
    for ax, radius in zip(axes, [None, *radii], strict=True):
        for row, (title, found) in enumerate(final.items()):
            spread = found["test_accuracy"] if radius is None else found["autoattack"].get(radius)
            if spread is not None:
                _dots(ax, row, title, spread)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_title("clean" if radius is None else f"AutoAttack, ε = {radius}", fontsize=10.5, color=INK)
        ax.set_yticks(range(len(final)), list(final))
        clean_axes(ax)
        ax.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axes[0].invert_yaxis()
    set_title(figure, f"Accuracy, {net}", "A dot is a seed, the bar their mean. Solid: with EMR.")
    save_figure(figure, path)


def _dots(ax: Any, row: float, title: str, spread: Mapping[str, Any]) -> None:
    """The seeds of one method on its row, and their mean."""
    defense = title.split()[0].strip(",").lower()
    color = _COLORS.get(defense, INK)
    face = color if "EMR" in title else "white"
    values = spread["values"]
    ax.plot([spread["mean"]] * 2, [row - 0.3, row + 0.3], color=color, linewidth=2)
    ax.plot(values, [row] * len(values), "o", color=color, markerfacecolor=face, markersize=5)


def _margins(path: Path, plan: Plan, choices: Choices, net: str) -> None:
    """The distributions of effective margins of the first seed's models."""
    columns = {}
    for title, specs in plan.final_specs(choices).items():
        job = measure.margins(plan.output, specs[0], plan.settings)
        if title.startswith(f"{net} ") and "equal cost" not in title and job.done:
            columns[title.removeprefix(f"{net} ")] = torch.tensor(read(job.path)["margins"])
    if columns:
        subtitle = f"{net}, seed {plan.settings.seeds[0]}, clean test images. Solid vertical line: median."
        margin_distributions(path, columns, subtitle)


def _ablation(path: Path, results: Mapping[str, Any]) -> None:
    """A panel for each net and training; a row for each temperature and centring, a dot for each seed."""
    rows = results["ablation"]
    bases = list(dict.fromkeys(row["base"] for row in rows))
    columns = min(4, len(bases))
    height = -(-len(bases) // columns)
    figure = Figure(figsize=(3.4 * columns + 1.2, 2.4 * height + 0.6))
    axes = np.atleast_1d(figure.subplots(height, columns, sharey=False)).flatten()
    for ax, base in zip(axes, bases, strict=False):
        among = [row for row in rows if row["base"] == base]
        for place, row in enumerate(among):
            _dots(ax, place, f"{base.split()[1]}{' EMR' if row['emr'] else ''}", next(iter(row["autoattack"].values())))
        ax.set_yticks(range(len(among)), [row["setting"] for row in among], fontsize=7.5)
        ax.invert_yaxis()
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_title(base, fontsize=10, color=INK)
        clean_axes(ax)
        ax.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    for ax in axes[len(bases) :]:
        ax.set_axis_off()
    title = f"AutoAttack accuracy at ε = {results['settings']['standard_epsilon']:g}, of AT at its own"
    set_title(figure, title, "By temperature and centring, at one strength. A dot is a seed, the bar their mean.")
    save_figure(figure, path)


def _curves(path: Path, plan: Plan, models: Mapping[str, Any]) -> None:
    """PGD's accuracy against epsilon, a panel for each net; thin lines are seeds."""
    nets = list(dict.fromkeys(found["method"].split()[0] for found in models.values()))
    columns = min(2, len(nets))
    height = -(-len(nets) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.8 * height + 0.4))
    panels = np.atleast_1d(figure.subplots(height, columns, sharey=True)).flatten()
    for ax in panels[len(nets) :]:
        ax.set_axis_off()
    for ax, net in zip(panels, nets, strict=False):
        methods = [m for m in dict.fromkeys(f["method"] for f in models.values()) if m.startswith(f"{net} ")]
        methods = [m for m in methods if "equal cost" not in m]
        for number, method in enumerate(methods):
            curves = [f["curve"] for f in models.values() if f["method"] == method]
            color = PALETTE[number // 2 % len(PALETTE)]
            line = "-" if "EMR" in method else "--"
            for seed, curve in enumerate(curves):
                name = method.removeprefix(f"{net} ") if seed == 0 else None
                ax.plot(*zip(*curve, strict=True), color=color, linestyle=line, linewidth=1.1, label=name)
        ax.set_title(net, fontsize=10.5, color=INK)
        ax.set_xlabel("Radius ε of the L∞ ball")
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.legend(frameon=False, fontsize=7.5, labelcolor=INK)
        clean_axes(ax)
    set_title(figure, "Accuracy under PGD-40 down to zero", "Solid: with EMR. A line is a seed.")
    save_figure(figure, path)


def _surfaces(path: Path, plan: Plan, choices: Choices, net: str) -> None:
    """The logit margin on a plane around one image, of the first seed's models."""
    found = {}
    for title, specs in plan.final_specs(choices).items():
        job = diagnosis(plan.output, specs[0], (), plan.settings)
        if title.startswith(f"{net} ") and "equal cost" not in title and job.done:
            found[title.removeprefix(f"{net} ")] = read(job.path)["surface"]
    if not found:
        return
    columns = min(5, len(found))
    height = -(-len(found) // columns)
    figure = Figure(figsize=(2.7 * columns, 2.6 * height + 0.4))
    axes = np.atleast_1d(figure.subplots(height, columns)).flatten()
    for ax, (title, surface) in zip(axes, found.items(), strict=False):
        offsets, values = np.array(surface["offsets"]), np.array(surface["margin"])
        largest = max(float(np.abs(values).max()), 1e-6)
        ax.pcolormesh(offsets, offsets, values, cmap="RdBu", vmin=-largest, vmax=largest, shading="nearest")
        if values.min() < 0 < values.max():
            ax.contour(offsets, offsets, values, levels=[0], colors=INK, linewidths=1)
        ax.set_title(title, fontsize=9, color=INK)
        ax.tick_params(labelsize=7)
    for ax in axes[len(found) :]:
        ax.set_axis_off()
    set_title(
        figure,
        f"Logit margin around one test image, {net}",
        "Horizontal: along the gradient's sign; vertical: along random signs; to 2 ε. Line: the decision boundary.",
    )
    save_figure(figure, path)


def _prediction(path: Path, points: Mapping[float, Sequence[Mapping[str, Any]]], found: Mapping[str, Any]) -> None:
    """AutoAttack accuracy against each quantity, a row for each radius; a dot is a model."""
    figure = Figure(figsize=(3.1 * len(QUANTITIES), 2.7 * len(points) + 0.6))
    axes = np.atleast_2d(figure.subplots(len(points), len(QUANTITIES), sharey="row"))
    for row, (epsilon, models) in zip(axes, points.items(), strict=True):
        for ax, quantity in zip(row, QUANTITIES, strict=True):
            for model in models:
                color = _COLORS[model["defense"]]
                face = color if model["emr"] else "none"
                marker = _MARKERS.get(model["net"], "o")
                ax.plot(model[quantity], model["robust"], marker, color=color, markerfacecolor=face, markersize=4)
            value = found[f"{epsilon:g}"][quantity]
            if value["rho"] is not None and value["low95"] is not None:
                text = f"ρ = {value['rho']:+.2f} ({value['low95']:+.2f} to {value['high95']:+.2f})"
                ax.set_title(text, fontsize=8.5, color=INK)
            if "norm" in quantity and min(model[quantity] for model in models) > 0:
                ax.set_xscale("log")
                ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_xlabel(f"median {quantity}", fontsize=8.5)
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            clean_axes(ax)
        row[0].set_ylabel(f"AutoAttack, ε = {epsilon:g}")
    set_title(
        figure,
        "What predicts robust accuracy",
        "A dot is a model: orange standard, blue AT, green TRADES; filled with EMR; circle MLP, square MLP with "
        "BatchNorm, triangle CNN, diamond CNN with BatchNorm. Intervals: configurations resampled.",
    )
    save_figure(figure, path)
