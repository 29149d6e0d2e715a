"""Theoretical occupancy of a GPU's multiprocessors, from what the compiler reports about a kernel."""

from __future__ import annotations

from dataclasses import dataclass

_WARP = 32
_REGISTERS = 65536
_REGISTER_UNIT = 256  # registers are handed out to a warp in such portions
_PARTITIONS = 4  # each has a quarter of the registers, and a warp's are in one of them
_SHARED_UNIT = 128
_SHARED_OF_SYSTEM = 1024  # of each block


@dataclass(frozen=True)
class _Multiprocessor:
    threads: int
    blocks: int
    shared: int  # bytes


#: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
_MULTIPROCESSORS = {
    "8.0": _Multiprocessor(2048, 32, 164 << 10),
    "8.6": _Multiprocessor(1536, 16, 100 << 10),
    "8.9": _Multiprocessor(1536, 24, 100 << 10),
    "9.0": _Multiprocessor(2048, 32, 228 << 10),
    "10.0": _Multiprocessor(2048, 32, 228 << 10),
    "10.3": _Multiprocessor(2048, 32, 228 << 10),
    "12.0": _Multiprocessor(1536, 24, 100 << 10),
}


def occupancy(architecture: str, registers: int, shared: int, threads: int) -> float | None:
    """The share of a multiprocessor's warps that can be resident at a time.

    blocks = min(those that the limits on blocks and on threads allow,
                 warps for which a partition has registers, times the partitions, over the warps of a block,
                 shared memory over that of a block), and occupancy = blocks * threads / threads of the multiprocessor.

    Args:
        architecture: "9.0", "9.0a".
        registers: of a thread.
        shared: bytes of a block.
        threads: of a block.

    Returns:
        between 0 and 1; None for an architecture that is not listed here.
    """
    limits = _MULTIPROCESSORS.get(architecture.rstrip("af"))
    if limits is None:
        return None
    warps = -(-threads // _WARP)
    of_warp = -(-registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // _PARTITIONS // max(of_warp, 1) * _PARTITIONS // warps
    of_block = -(-(shared + _SHARED_OF_SYSTEM) // _SHARED_UNIT) * _SHARED_UNIT
    blocks = min(limits.blocks, limits.threads // (warps * _WARP), by_registers, limits.shared // of_block)
    return blocks * warps * _WARP / limits.threads
