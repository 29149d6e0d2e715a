"""The runs by name, and their configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emr_training.config import RunConfig, make_config, merge
from emr_training.config.presets import preset
from emr_training.errors import nearest

NETWORKS = ("preactresnet-18", "wrn-34-10")
METHODS = tuple(f"{method}{suffix}" for method in ("at", "trades", "mail-at", "mail-trades") for suffix in ("", "-emr"))
NAMES = tuple(f"{network}-{method}" for network in NETWORKS for method in METHODS)

#: A run that shows that everything works, and nothing else.
_SMOKE: dict[str, Any] = {
    "data": {"name": "experiments.cifar10.data:few", "root": None, "validation": 32, "checksums": False},
    "attack": {"steps": 2, "step_size": None},
    "trainer": {"batch_size": 32},
    "evaluation": {"steps": 2, "step_size": None},
}


def parse_names(text: str) -> tuple[str, ...]:
    """The names in "preactresnet-18-at,wrn-34-10-trades-emr". Raises ValueError, naming the nearest, for another."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in NAMES:
            raise ValueError(f"models has {name!r}; {nearest(name, list(NAMES))}")
    if not names:
        raise ValueError(f"models has no name; expected some of {', '.join(NAMES)}")
    return names


def configuration(
    name: str,
    *,
    root: str | None,
    seed: int,
    epochs: int | None,
    smoke: bool,
    device: str,
    precision: str,
    changes: Sequence[tuple[str, Any]],
) -> RunConfig:
    """The preset of this name; with other epochs its milestones move in proportion."""
    options = merge(preset(f"clean/cifar10-{name}"), {"data.root": root, "trainer.seed": seed})
    options = merge(options, {"trainer.device": device, "trainer.precision": precision})
    options = merge(options, {"trainer.channels_last": device == "cuda"})
    if smoke:
        options, epochs = merge(options, _SMOKE), epochs or 2
    if epochs is not None:
        options = _shortened(options, epochs)
    for key, value in changes:
        options = merge(options, {key: value})
    return make_config(options)


def _shortened(options: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """The same course over so many epochs."""
    share = epochs / options["trainer"]["epochs"]
    changed = merge(options, {"trainer.epochs": epochs})
    milestones = options["schedule"].get("milestones", [])
    changed = merge(changed, {"schedule.milestones": [round(m * share, 3) for m in milestones]})
    defense = options["defense"]
    if isinstance(defense, Mapping) and "burn_in" in defense:
        changed = merge(changed, {"defense.burn_in.epoch": 1 + round((defense["burn_in"]["epoch"] - 1) * share)})
    return changed
