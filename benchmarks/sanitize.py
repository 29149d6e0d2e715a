"""Small launches of every operator on every backend of a device, for compute-sanitizer to watch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from emr_kernels import ops
from emr_kernels.ops import _dispatch

SHAPES = [(3, 5, 7, 9), (2, 16, 8, 8), (4, 33, 1, 1), (1, 3, 33, 31)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def launches(device: torch.device) -> list[Callable[[], Any]]:
    """Calls of the public operators."""
    found: list[Callable[[], Any]] = []
    for shape in SHAPES:
        for dtype in DTYPES:
            for layout in (torch.contiguous_format, torch.channels_last):
                a, skip, delta = (
                    torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout) for _ in range(3)
                )
                scale, shift = (torch.randn(shape[1], device=device) for _ in range(2))
                x, origin = (torch.rand(shape, device=device).to(dtype) for _ in range(2))

                def affine(a=a, skip=skip, delta=delta, scale=scale, shift=shift, layout=layout):  # type: ignore[no-untyped-def]
                    y, bits = ops.affine_relu(a, scale, shift, skip, 0.1)
                    ops.affine_relu_vjp(delta, bits, scale, 0.1, memory_format=layout)
                    ops.affine_relu_jvp(skip, bits, scale, 0.1, delta, memory_format=layout)
                    ops.affine_relu_vjp(y, bits, memory_format=layout, out=y)

                def steps(x=x, origin=origin, delta=delta):  # type: ignore[no-untyped-def]
                    ops.pack_bits(x > origin)
                    ops.sq_norms([x, delta])
                    for norm in ("linf", "l2", "l1"):
                        ops.pgd_step(x, origin, delta, 0.1, 0.3, norm, fraction=0.2)
                        ops.pgd_start(origin, 0.3, norm, seed=1)

                found += [affine, steps]
    return found


def run(device: torch.device) -> None:
    """Launch everything on each backend in turn; wait, and tell how much it was."""
    from emr_kernels import _extension

    calls = launches(device)
    for backend in ("cuda", "triton") if device.type == "cuda" else ("cpu",):
        served = []
        for operator in _dispatch.operators.values():
            try:
                operator.kernel(backend)
            except _dispatch.BackendUnavailableError:
                continue
            served.append(operator.name)
        _extension.forced = backend
        for operator in _dispatch.operators.values():
            operator._chosen.clear()
        for call in calls:
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print(f"{backend}: {len(calls)} groups of launches; has {', '.join(served)}")
