"""Which GPU backend is tried first for which operator, by size."""

from __future__ import annotations

#: What was measured fastest: for each operator, (bits, backend) in rising order of bits, the backend that serves
#: tensors of fewer than 2**bits elements. An operator that is not here has not been measured: CUDA C++ comes first.
MEASURED: dict[str, tuple[tuple[int, str], ...]] = {}


def order(name: str, size_bits: int) -> tuple[str, ...]:
    """The GPU backends to try for tensors of fewer than 2**size_bits elements, best first."""
    first = next((backend for bits, backend in MEASURED.get(name, ()) if size_bits <= bits), "cuda")
    return (first, "triton" if first == "cuda" else "cuda")


def reason(name: str, backend: str, device: str) -> str:
    """Why this backend serves the operator on this type of device."""
    if device == "cpu":
        return "compiled and loaded"
    if name in MEASURED:
        return "measured fastest at this size"
    return "first in order; not measured yet"
