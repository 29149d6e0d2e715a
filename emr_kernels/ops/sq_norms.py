"""Per-sample squared 2-norms of several tensors at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emr_kernels.ops import _checks, _dispatch
from emr_kernels.ops._format import compute_dtype, dense_samples


def _result_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def sq_norms_reference(tensors: list[torch.Tensor]) -> torch.Tensor:
    """`sq_norms` in plain PyTorch."""
    dtype = _result_dtype(tensors)
    rows = []
    for tensor in tensors:
        samples = tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
        # No temporary of the tensor's size, as a product would need; the root and its square cost one rounding.
        norm = torch.linalg.vector_norm(samples, dim=1, dtype=compute_dtype(tensor))
        rows.append(norm.square().to(dtype))
    return torch.stack(rows)


def _sq_norms_fake(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0].new_empty((len(tensors), tensors[0].shape[0]), dtype=_result_dtype(tensors))


_sq_norms = _dispatch.define("sq_norms(Tensor[] tensors) -> Tensor", sq_norms_reference, _sq_norms_fake)


def sq_norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ t[n]² over all elements of sample n, for each tensor t of a list: one launch for all of them.

    Products and sums are float32 with many partial sums, float64 for float64 tensors. The same number comes out
    whatever the number of threads.

    Args:
        tensors: at least one; float32, bfloat16, float16 or float64, `[N, ...]` with one N and on one device.
            Shapes and dtypes may differ. A tensor whose samples are dense in any order of their dimensions is read
            where it lies, others are copied.

    Returns:
        `[len(tensors), N]`; float64 if a tensor is, else float32.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape or device.
        RuntimeError: if a tensor requires grad in grad mode (the operator has no derivative of its own).
    """
    tensors = list(tensors)
    if not tensors:
        raise ValueError("tensors is empty; expected at least one tensor")
    for place, tensor in enumerate(tensors):
        name = f"tensors[{place}]"
        _checks.check_floating(name, tensor)
        _checks.check_not_differentiated("sq_norms", **{name: tensor})
        if tensor.dim() == 0 or tensor.shape[0] != tensors[0].shape[0]:
            batch = tuple(tensors[0].shape[:1]) or ("N",)
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected [{batch[0]}, ...]")
        if tensor.device != tensors[0].device:
            raise ValueError(f"{name} is on device {tensor.device}; expected {tensors[0].device}, that of tensors[0]")
    dense = [dense_samples(t) for t in tensors]
    # A float64 tensor decides which backend serves.
    widest = next((t for t in dense if t.dtype == torch.float64), dense[0])
    return _sq_norms(widest, dense)
