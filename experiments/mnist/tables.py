"""The tables of the README, from the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.markers import number, percent, table


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Each table by the name of its markers."""
    return {
        "runs": _runs(results),
        "sweep": _sweep(results["sweep"]),
        "final": _final(results["final"]),
        "differences": _differences(results["differences"]),
        "ablation": _ablation(results["ablation"]),
        "masking": _masking(results["masking"]),
        "predict": _predict(results["predict"]),
    }


def _runs(results: Mapping[str, Any]) -> str:
    given, where = results["settings"], results["environment"]
    missing = len(results["missing"])
    seeds = ", ".join(map(str, given["seeds"]))
    lines = [
        f"{given['train_images']} training, {given['validation_images']} validation and {given['attacked']} attacked "
        f"test images of {given['data']}; {given['epochs']} epochs (few images: {given['few_images']} for "
        f"{given['few_epochs']} epochs); seeds {seeds}. "
        f"{results['computing_seconds'] / 3600:.2f} hours of one thread in all, "
        f"with torch {where['packages']['torch']}."
    ]
    if missing:
        lines.append(f"**Not complete: {missing} results are missing** (`missing` in results.json).")
    return "\n".join(lines)


def _sweep(sweep: Mapping[str, Any]) -> str:
    rows = []
    for base, found in sweep.items():
        without, one_seed = found["without_emr"], found["one_seed"]
        chosen = next(c for c in found["finalists"] if c["chosen"])
        at40 = [c for c in one_seed["candidates"] if c["temperature"] >= 10 and c["clean_accuracy"] is not None]
        best40 = max((c["mean_robust_accuracy"] for c in at40), default=float("nan"))
        rows.append(
            [
                base,
                found["chosen"],
                f"{100 * (without['clean_accuracy'] or 0):.1f}",
                f"{100 * (chosen['clean_accuracy'] or 0):.1f}",
                f"{100 * without['mean_robust_accuracy']:.1f}",
                f"{100 * chosen['mean_robust_accuracy']:.1f}",
                f"{100 * one_seed['without_emr']['mean_robust_accuracy']:.1f}",
                f"{100 * best40:.1f}",
            ]
        )
    headers = ["trained", "chosen", "clean, λ=0", "clean, chosen", "robust, λ=0", "robust, chosen"]
    return table([*headers, "λ=0, one seed", "best at T=40, one seed"], rows)


def _final(final: Mapping[str, Any]) -> str:
    radii = list(dict.fromkeys(radius for found in final.values() for radius in found["autoattack"]))
    headers = ["method", "setting", "epochs", "clean %", *(f"AA {radius} %" for radius in radii)]
    headers += ["effective margin", "attacked", "weight norm", "seconds"]
    return table(
        headers,
        [
            [
                title,
                found["emr"] or "",
                str(found["epochs"]),
                percent(found["test_accuracy"]),
                *(percent(found["autoattack"][radius]) if radius in found["autoattack"] else "" for radius in radii),
                number(found["median_margin"]),
                number(found["median_margin_attacked"]),
                number(found["median_weight_norm"]),
                f"{found['training_seconds']['mean']:.0f}",
            ]
            for title, found in final.items()
        ],
    )


def _differences(differences: list[dict[str, Any]]) -> str:
    if not differences:
        return "Not run."
    radii = sorted({name for d in differences for name in d if name.replace(".", "").isdigit()})
    rows = [
        [
            f"{d['method']} against {d['against']}",
            _points(d["test_accuracy"]),
            *(_points(d[radius]) if radius in d else "" for radius in radii),
            "-" if d["median_margin"]["mean"] is None else f"{d['median_margin']['mean']:+.3f}",
        ]
        for d in differences
    ]
    return table(["points gained", "clean", *(f"AA {radius}" for radius in radii), "effective margin"], rows)


def _points(difference: Mapping[str, Any]) -> str:
    std = "" if difference["std"] is None else f" ± {100 * difference['std']:.1f}"
    return f"{100 * difference['mean']:+.1f}{std} ({difference['larger']}/{difference['of']})"


def _ablation(ablation: list[dict[str, Any]]) -> str:
    rows = []
    for found in ablation:
        ((_, robust),) = found["autoattack"].items()
        rows.append(
            [
                found["base"],
                found["setting"],
                percent(found["test_accuracy"]),
                percent(robust),
                number(found["median_margin"]),
                number(found["median_weight_norm"]),
                number(found["median_gradient_T40"]),
                number(found["median_mean_logit_gradient"]),
            ]
        )
    headers = ["trained", "setting", "clean %", "AA %", "effective margin", "‖g‖, T=1", "‖g‖, T=40", "‖∇z̄‖"]
    return table(headers, rows)


def _masking(masking: Mapping[str, Any]) -> str:
    rows = []
    for found in masking["models"].values():
        transfer = min(found["transfer"].values(), default=None)
        fab = found["distances"]["fab"]
        rows.append(
            [
                f"{found['method']}, seed {found['seed']}",
                f"{100 * found['white_box']:.1f}",
                f"{100 * found['square']:.1f}",
                "" if transfer is None else f"{100 * transfer:.1f}",
                f"{100 * (found['pgd'] - found['pgd_restarts']):.1f}",
                f"{found['curve'][-1][0]:g}" if found["curve"][-1][1] == 0 else "never",
                "" if fab["rho"] is None else f"{fab['rho']:.2f}",
                "" if fab["median_ratio"] is None else f"{fab['median_ratio']:.2f}",
                found["verdict"] + (f" ({', '.join(found['failed'])})" if found["failed"] else ""),
            ]
        )
    headers = ["model", "white box %", "Square %", "transfer %", "restarts gain", "0 at ε", "rank corr.", "ratio"]
    return table([*headers, "verdict"], rows)


def _predict(predict: Mapping[str, Any]) -> str:
    rows = []
    for radius, found in predict.items():
        for quantity, value in found.items():
            rho = "-" if value["rho"] is None else f"{value['rho']:+.2f}"
            low, high = value["low95"], value["high95"]
            interval = "-" if low is None else f"{low:+.2f} to {high:+.2f}"
            rows.append([quantity, radius, rho, interval, f"{value['models']} ({value['configurations']})"])
    return table(["median of", "ε", "Spearman", "95% interval", "models (configurations)"], rows)
