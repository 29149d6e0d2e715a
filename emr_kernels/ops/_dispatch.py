"""The operators' library and their backends.

Every operator is defined here, in Python, with its reference as the implementation for every device.
The compiled library registers faster kernels for the devices it knows; the dispatcher then prefers them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from emr_kernels import _extension

library = torch.library.Library("emr", "DEF")
#: Every operator defined so far, by name without the namespace.
operators: dict[str, Any] = {}
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define one operator of the namespace `emr`; returns its overload, ready to be called."""
    name = schema[: schema.index("(")]
    library.define(schema, tags=_TAGS)
    library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"emr::{name}", fake, lib=library)
    operators[name] = getattr(torch.ops.emr, name).default
    return operators[name]


def prepare(tensor: torch.Tensor) -> None:
    """Have the backend of this tensor's device ready before an operator is called on it."""
    if _extension.library is None and tensor.is_cpu and not torch.compiler.is_compiling():
        if _extension.pending:
            _extension.build_on_first_use()
        else:
            _extension.require_forced()


def serving(name: str, device: str) -> tuple[str, str]:
    """Which backend serves an operator on a device type, and why."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    if key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"emr::{name}", key):
        return device, "forced by EMR_BACKEND" if _extension.forced else "compiled and loaded"
    if device == "cpu":
        return "reference", _extension.reason or "not part of the loaded library"
    return "reference", f"no compiled kernel for {device}"
