"""Configurations from files and arguments, with faults named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from emr_training.config.run import RunConfig
from emr_training.config.section import Section
from emr_training.errors import nearest


class ConfigError(ValueError):
    """An unknown option or a value out of range; the message names each and what was expected."""


def make_config(options: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from nested option names and values; a key may also be a dotted path.

    Raises ConfigError with one line for each fault: an unknown name with the nearest valid one, a value
    with what was expected in its place.
    """
    try:
        return RunConfig.model_validate(merge({}, options))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault) for fault in error.errors())) from None


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`: nested mappings are merged, other values replaced; dotted keys are paths into them."""
    result = dict(base)
    for key, value in changes.items():
        head, _, rest = str(key).partition(".")
        if rest:
            value = {rest: value}
        old = result.get(head)
        if isinstance(value, Mapping):
            # A section that is given by its name alone goes on as that section.
            result[head] = merge({"name": old} if isinstance(old, str) else old or {}, value)
        elif isinstance(value, str) and isinstance(old, Mapping):
            result[head] = merge(old, {"name": value})
        else:
            result[head] = value
    return result


def parse_override(text: str) -> tuple[str, Any]:
    """The dotted path and the value of "key.sub=value", which is YAML. Raises ConfigError for anything else."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"argument {text!r} sets nothing; expected key.sub=value, such as trainer.epochs=10")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"the value of {key.strip()} is {value!r}; expected YAML") from None


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file. Raises ConfigError unless it holds one mapping."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ConfigError(f"{path} holds a {type(options).__name__}; expected option names and values")
    return options


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML, which `read_config` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)


def _explain(fault: Any) -> str:
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path)
    if fault["type"] == "extra_forbidden":
        return f"unknown option {name!r}; {_nearest_path(path)}"
    message = fault["msg"].removeprefix("Value error, ")
    expected = message.replace("Input should be", "expected").replace("Field required", "expected a value")
    if fault["type"] == "model_type":
        expected = f"expected its options, as in {name}.{_first_option(path)}"
    if fault["type"] == "value_error" and not isinstance(fault["input"], (str, int, float)):
        return f"{name}: {expected}" if name else expected
    return f"{name} is {fault['input']!r}; {expected}"


def _nearest_path(path: list[str]) -> str:
    """A hint: the closest option of the same section, else the closest last name of any."""
    section: type[Section] = RunConfig
    for part in path[:-1]:
        section = _section(section, part) or section
    prefix = ".".join(path[:-1])
    fields = list(section.model_fields)
    close = get_close_matches(path[-1], fields, n=1, cutoff=0.6)
    if not close:
        # Of those that share a name the one nearest to the top, the first of these.
        leaves = list(_leaves(RunConfig))[::-1]
        everywhere = dict(sorted(leaves, key=lambda leaf: -leaf[1].count(".")))
        found = get_close_matches(path[-1], list(everywhere), n=1, cutoff=0.75)
        if found:
            return f"did you mean {everywhere[found[0]]!r}?"
    dotted = [f"{prefix}.{field}" if prefix else field for field in fields]
    return nearest(f"{prefix}.{path[-1]}", dotted) if close else f"expected one of {', '.join(map(repr, dotted))}"


def _first_option(path: list[str]) -> str:
    """The first option below this path, as one would set it."""
    section: type[Section] = RunConfig
    for part in path:
        section = _section(section, part) or section
    name, value = next(_leaves(section))[1], "..."
    return f"{name}={value}"


def _section(section: type[Section], name: str) -> type[Section] | None:
    """The section that a field holds, if it holds one."""
    field = section.model_fields.get(name)
    kinds = () if field is None else (field.annotation, *get_args(field.annotation))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)


def _leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The last name and the path of every option, in order."""
    for name in section.model_fields:
        inner = _section(section, name)
        if inner is None:
            yield name, prefix + name
        else:
            yield from _leaves(inner, f"{prefix}{name}.")
