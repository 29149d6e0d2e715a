"""What a configuration names by its import path."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def is_import_path(name: str) -> bool:
    """Whether `name` is "package.module:callable" or "package.module.callable", rather than one of the names here."""
    return ":" in name or "." in name


def import_callable(what: str, path: str) -> Callable[..., Any]:
    """The callable at "package.module:callable" or "package.module.callable"; `what` says in errors what it is for.

    Raises ValueError naming the package that is not installed, the name that is not in its module, or what is there
    that cannot be called. An error inside the module itself is passed on.
    """
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    expected = "expected a callable as 'package.module:callable'"
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise ValueError(f"{what} is {path!r}; {expected}")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        package = module_name.partition(".")[0]
        if error.name == package or find_spec(package) is None:
            raise ValueError(f"{what} is {path!r}; {expected}, but the package {package} is not installed") from None
        if error.name is not None and module_name.startswith(error.name):
            raise ValueError(f"{what} is {path!r}; {expected}: {error}") from None
        raise ValueError(f"{what} is {path!r}, which needs a package that is not installed: {error.name}") from error
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ValueError(f"{what} is {path!r}; {expected}: {module_name} has no {attribute}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(f"{what} is {path!r}, of type {type(found).__name__}; {expected}")
    return found
