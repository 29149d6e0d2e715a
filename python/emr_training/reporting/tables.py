"""Results as text: a table of evaluations, and one line for each epoch."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table

from emr_training.evaluation import Accuracy, Evaluation
from emr_training.training.metrics import EpochMetrics


def evaluation_table(
    rows: Mapping[str, Evaluation],
    attack: str,
    chosen: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Table:
    """One row a method: accuracies in percent with their standard error, median margin and weight norm.

    `attack` names the attack in the header; `chosen` adds a column of settings, by method.
    """
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
        title_style="bold",
    )
    headers = ["Clean\naccuracy\n%"]
    headers += [f"{attack}\nε = {epsilon:g}\n%" for epsilon in next(iter(rows.values())).robust]
    headers += ["Median\neffective\nmargin", "Median\neffective\nweight\nnorm"]
    table.add_column("Method", no_wrap=True, vertical="bottom")
    if chosen is not None:
        table.add_column("EMR chosen", no_wrap=True, vertical="bottom")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True, vertical="bottom")
    for method, evaluation in rows.items():
        table.add_row(
            method,
            *([] if chosen is None else [chosen.get(method, "-")]),
            percent(evaluation.clean),
            *map(percent, evaluation.robust.values()),
            f"{evaluation.median_margin:.3f}",
            f"{evaluation.median_weight_norm:.2f}",
        )
    return table


def percent(accuracy: Accuracy) -> str:
    """An accuracy and its binomial standard error, in percent."""
    return f"{100 * accuracy.value:.1f} ± {100 * accuracy.standard_error:.1f}"


def metrics_line(metrics: EpochMetrics, epochs: int) -> str:
    """One epoch's metrics on one line."""
    parts = [f"epoch {metrics.epoch:{len(str(epochs))}d}/{epochs}"]
    parts += [f"{name} {value:.4f}" for name, value in metrics.losses.items()]
    parts.append(f"train {100 * metrics.train_accuracy:.1f}%")
    if metrics.validation_accuracy is not None:
        parts.append(f"val clean {100 * metrics.validation_accuracy:.1f}%")
    if metrics.validation_robust_accuracy is not None:
        parts.append(f"val PGD {100 * metrics.validation_robust_accuracy:.1f}%")
    parts.append(f"{metrics.seconds:.2f} s")
    return "  ".join(parts)
