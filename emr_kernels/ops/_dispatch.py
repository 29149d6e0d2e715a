"""The operators and their backends.

Every operator is defined here, in Python, with its reference as the implementation for every device. Faster backends
stand behind it under the same signature:

    cpu     C++, registered for the CPU by the compiled library under `emr`
    cuda    CUDA C++, registered by the CUDA library under `emr_cuda`
    triton  a launcher of the operator's name in `emr_kernels.triton.launchers`

`emr::<name>` on a GPU picks between the last two; see `Operator.serving`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from emr_kernels import _extension
from emr_kernels.ops import _winners

BACKENDS = ("reference", "cpu", "triton", "cuda")

_library = torch.library.Library("emr", "DEF")
_cuda_library = torch.library.Library("emr_cuda", "DEF")
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)


class BackendUnavailableError(LookupError):
    """A backend does not serve an operator here; the message says why."""


class Operator:
    """One operator of the namespace `emr`.

    Called with the tensor that decides the backend and then the operator's arguments: checked, dense, positional.

    Attributes:
        name: without the namespace.
        overload: `torch.ops.emr.<name>.default`.
        reference: the implementation in plain PyTorch.
    """

    def __init__(self, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.name = name = schema[: schema.index("(")]
        self.reference = reference
        _library.define(schema, tags=_TAGS)
        _library.impl(name, reference, "CompositeExplicitAutograd")
        _library.impl(name, self._on_cuda, "CUDA")
        if _extension.interpreted:
            _library.impl(name, self._interpreted, "CPU")
        torch.library.register_fake(f"emr::{name}", fake, lib=_library)
        # One schema for both: the CUDA library registers its kernels under this name.
        _cuda_library.define(schema, tags=_TAGS)
        self.overload: Any = getattr(torch.ops.emr, name).default
        self._chosen: dict[tuple[torch.dtype, int], Callable[..., Any]] = {}
        self._compiled = False

    def __call__(self, on: torch.Tensor, *args: Any) -> Any:
        if on.is_cuda:
            # Straight to the kernel where nothing traces: the dispatcher's way through Python costs a launch.
            if type(on) is torch.Tensor and not torch.compiler.is_compiling():
                return self._cuda_kernel(on)(*args)
        elif on.is_cpu and not torch.compiler.is_compiling():
            _extension.prepare()
        return self.overload(*args)

    def compiled(self) -> bool:
        """Whether the CPU has its kernel here. For every call: once it has, nothing is looked up again."""
        self._compiled = self._compiled or self.serving("cpu")[0] == "cpu"
        return self._compiled

    def _on_cuda(self, *args: Any) -> Any:
        return self._cuda_kernel(_first_tensor(args))(*args)

    def _interpreted(self, *args: Any) -> Any:
        return self.kernel(self.serving("cpu", _first_tensor(args).dtype)[0])(*args)

    def _cuda_kernel(self, on: torch.Tensor) -> Callable[..., Any]:
        key = (on.dtype, on.numel().bit_length())
        chosen = self._chosen.get(key)
        if chosen is None:
            if _extension.forced in (None, "cuda"):
                _extension.prepare()
            chosen = self._chosen[key] = self.kernel(self.serving("cuda", *key)[0])
        return chosen

    def serving(self, device: str, dtype: torch.dtype = torch.float32, size_bits: int = 24) -> tuple[str, str]:
        """The backend for tensors of a type of device, of a dtype and of fewer than 2**size_bits elements; and why."""
        forced = _extension.forced
        if device == "cpu":
            order: tuple[str, ...] = ("triton" if _extension.interpreted and dtype != torch.float64 else "cpu",)
        elif device == "cuda" and forced == "cpu":
            return "reference", "EMR_BACKEND is 'cpu'"
        elif device == "cuda" and dtype != torch.float64:
            order = _winners.order(self.name, size_bits) if forced is None else (forced,)
        else:
            return "reference", f"no kernels for {dtype} on {device}"
        reasons = []
        for backend in order:
            try:
                self.kernel(backend)
            except BackendUnavailableError as error:
                reasons.append(f"{backend}: {error}")
                continue
            why = "forced by EMR_BACKEND" if backend == forced else _winners.reason(self.name, backend, device)
            return backend, "; ".join([*reasons, why])
        return "reference", "; ".join(reasons)

    def kernel(self, backend: str) -> Callable[..., Any]:
        """One backend's implementation, with the operator's arguments.

        Raises:
            BackendUnavailableError: if it cannot be had here; the message says why.
        """
        if backend == "reference":
            return self.reference
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
        return _KERNELS[backend](self)


def _first_tensor(args: tuple[Any, ...]) -> torch.Tensor:
    return next(t for a in args for t in (a if isinstance(a, list) else (a,)) if isinstance(t, torch.Tensor))


def _cpu_kernel(operator: Operator) -> Callable[..., Any]:
    if _extension.interpreted or not torch._C._dispatch_has_kernel_for_dispatch_key(f"emr::{operator.name}", "CPU"):
        raise BackendUnavailableError(_extension.reason or "not part of the loaded library")
    return operator.overload


def _cuda_kernel(operator: Operator) -> Callable[..., Any]:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"emr_cuda::{operator.name}", "CUDA"):
        raise BackendUnavailableError(_extension.cuda_reason or "not part of the CUDA library")
    return getattr(torch.ops.emr_cuda, operator.name).default


def _triton_kernel(operator: Operator) -> Callable[..., Any]:
    try:
        from emr_kernels.triton import launchers
    except ImportError as error:
        raise BackendUnavailableError(f"Triton cannot be imported: {error}") from None
    if operator.name not in launchers:
        raise BackendUnavailableError("no Triton kernel")
    # As Triton looks for one, for each kernel's launcher.
    if torch.cuda.is_available() and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise BackendUnavailableError("Triton needs a C compiler, and there is none (looked for $CC, gcc and clang)")
    return launchers[operator.name]


_KERNELS = {"cpu": _cpu_kernel, "cuda": _cuda_kernel, "triton": _triton_kernel}

#: Every operator defined so far, by name.
operators: dict[str, Operator] = {}


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Operator:
    """Define one operator of the namespace `emr`."""
    operator = Operator(schema, reference, fake)
    operators[operator.name] = operator
    return operator
