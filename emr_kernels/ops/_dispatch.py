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
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define one operator of the namespace `emr`; returns its overload, ready to be called."""
    name = schema[: schema.index("(")]
    library.define(schema, tags=_TAGS)
    library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"emr::{name}", fake, lib=library)
    return getattr(torch.ops.emr, name).default


def prepare(tensor: torch.Tensor) -> None:
    """Have the backend of this tensor's device ready before an operator is called on it."""
    if _extension.library is None and tensor.is_cpu and not torch.compiler.is_compiling():
        if _extension.pending:
            _extension.build_on_first_use()
        else:
            _extension.require_forced()
