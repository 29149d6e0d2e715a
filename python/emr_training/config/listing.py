"""Every option of a configuration, with its default and what it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from pydantic_core import PydanticUndefined

from emr_training.config.run import RunConfig
from emr_training.config.section import Section


class Option(NamedTuple):
    """One key of a configuration, such as "trainer.epochs"; `default` as YAML has it."""

    key: str
    default: str
    description: str


def options(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[Option]:
    """The options of a section and those below it, in order."""
    for name, field in section.model_fields.items():
        key = prefix + name
        inner = _section(field.annotation)
        default = field.get_default(call_default_factory=True)
        if inner is None:
            yield Option(key, _written(default), field.description or "")
            continue
        if isinstance(default, Section):
            yield from options(inner, key + ".")
            continue
        # Off unless something below it is given.
        alike = next((n for n, f in RunConfig.model_fields.items() if f.annotation is inner), None)
        summary = (inner.__doc__ or "").splitlines()[0]
        yield Option(
            key, _written(default), summary if alike is None else f"{summary} Its options are those of {alike}."
        )
        if alike is None:
            yield from options(inner, key + ".")


def _section(annotation: Any) -> type[Section] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _written(value: Any) -> str:
    if value is None or value is PydanticUndefined:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_written(item) for item in value)}]"
    return repr(value) if value == "" else str(value)
