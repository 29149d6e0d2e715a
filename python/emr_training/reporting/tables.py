"""Results as text: tables of evaluations, and one line for each epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from emr_training.costs import Costs
from emr_training.evaluation import Accuracy, Evaluation
from emr_training.evaluation.names import epsilon_text, label
from emr_training.evaluation.result import WORST, attack_rows
from emr_training.training.metrics import EpochMetrics


def evaluation_table(
    rows: Mapping[str, Evaluation], *, chosen: Sequence[str] | None = None, title: str | None = None
) -> Table:
    """One row a method: accuracies in percent with their standard error, median margin and weight norm at clean images.

    All have the same attacks, and margins. chosen: a column of settings, a text for each row.
    """
    table = _table(title)
    first = next(iter(rows.values()))
    headers = ["Clean\naccuracy\n%"]
    headers += [f"{label(a.name)}\nε = {epsilon_text(a.epsilon)}\n%" for a in first.attacks]
    headers += ["Median\neffective\nmargin", "Median\neffective\nweight\nnorm"]
    table.add_column("Method", no_wrap=True, vertical="bottom")
    if chosen is not None:
        table.add_column("EMR chosen", no_wrap=True, vertical="bottom")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True, vertical="bottom")
    for number, (method, evaluation) in enumerate(rows.items()):
        table.add_row(
            method,
            *([] if chosen is None else [chosen[number]]),
            percent(evaluation.clean),
            *(percent(attack.accuracy) for attack in evaluation.attacks),
            f"{evaluation.margins[0].median_margin:.3f}",
            f"{evaluation.margins[0].median_weight_norm:.2f}",
        )
    return table


def comparison_table(
    columns: Mapping[str, Evaluation],
    *,
    before: Mapping[str, Sequence[str]],
    after: Mapping[str, Sequence[str]],
    title: str,
) -> Table:
    """One column a run: accuracies in percent with their standard error, and medians of margins and weight norms.

    before, after: further rows by their names, a text for each column. A dash stands for what was not measured.
    """
    table = _table(title)
    evaluations = list(columns.values())
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row, texts in before.items():
        table.add_row(row, *texts)
    table.add_section()
    table.add_row("clean, %", *(percent(e.clean) for e in evaluations))
    for name, epsilon, found in attack_rows(evaluations):
        cells = ["-" if accuracy is None else percent(accuracy) for accuracy in found]
        style = "bold" if name == WORST else ""
        table.add_row(f"{label(name)}, ε = {epsilon_text(epsilon)}, %", *cells, style=style)
    table.add_section()
    for epsilon in sorted({m.epsilon for e in evaluations for m in e.margins}):
        images = f"ε = {epsilon_text(epsilon)}" if epsilon else "clean"
        margins = [e.margins_at(epsilon) for e in evaluations]
        for quantity, title in (("margins", "effective margin"), ("weight_norms", "effective weight norm")):
            medians = ("-" if m is None else _number(m.quartiles()[quantity]["median"]) for m in margins)
            table.add_row(f"{title}, {images}", *medians)
    table.add_section()
    for row, texts in after.items():
        table.add_row(row, *texts)
    return table


def attacks_table(evaluation: Evaluation, title: str | None = None) -> Table:
    """One row an attack: robust accuracy with its 95% interval, and what it cost for each image."""
    table = _table(title)
    for header in ("Attack", "ε"):
        table.add_column(header, no_wrap=True)
    for header in ("Robust %", "95% interval", "Seconds", "Forwards", "Backwards"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_row("clean", "", *_interval(evaluation.clean))
    for epsilon in evaluation.epsilons:
        table.add_section()
        among = [a for a in evaluation.attacks if a.epsilon == epsilon]
        for attack in among:
            table.add_row(
                label(attack.name), epsilon_text(epsilon), *_interval(attack.accuracy), *_per_image(attack.costs)
            )
        if len(among) > 1:
            worst = _interval(evaluation.worst(epsilon))
            table.add_row("worst case", epsilon_text(epsilon), *worst, style="bold")
    return table


def margins_table(evaluation: Evaluation) -> Table:
    """One row a set of images: median of its margins and weight norms, quartiles below."""
    table = _table(None)
    table.add_column("Images", no_wrap=True)
    norm = evaluation.margins[0].norm
    for header in (f"Effective margin\n({norm})", "Effective\nweight norm", "Probabilistic\nmargin"):
        table.add_column(header, justify="right", no_wrap=True)
    for margins in evaluation.margins:
        images = f"ε = {epsilon_text(margins.epsilon)}" if margins.epsilon else "clean"
        found = margins.quartiles()
        table.add_row(images, *(_spread(found[name]) for name in ("margins", "weight_norms", "probabilistic")))
    return table


def percent(accuracy: Accuracy) -> str:
    """An accuracy and its binomial standard error, in percent."""
    return f"{100 * accuracy.value:.1f} ± {100 * accuracy.standard_error:.1f}"


def _table(title: str | None) -> Table:
    return Table(
        title=title,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
        title_style="bold",
    )


def _interval(accuracy: Accuracy) -> tuple[str, str]:
    low, high = accuracy.interval()
    return f"{100 * accuracy.value:.2f}", f"{100 * low:.2f} to {100 * high:.2f}"


def _per_image(costs: Costs) -> tuple[str, str, str]:
    """Seconds, and passes for each image; nothing where another run served."""
    if not costs.images:
        return "", "", ""
    return f"{costs.seconds:.1f}", f"{costs.forwards / costs.images:.1f}", f"{costs.backwards / costs.images:.1f}"


def _spread(values: Mapping[str, Any]) -> str:
    low, median, high = (_number(values[name], digits) for name, digits in (("q25", 2), ("median", 3), ("q75", 2)))
    return f"{median}\n({low} to {high})"


def _number(value: float | None, digits: int = 3) -> str:
    return "inf" if value is None else f"{value:.{digits}g}"


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
