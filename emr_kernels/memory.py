"""Memory that tensors on the CPU give back, kept for the next ones."""

from __future__ import annotations

import ctypes

# glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
#: The heap grows by so many bytes more than was asked for.
_PAD = 1 << 26


def keep_memory() -> bool:
    """Have this process keep the memory that its tensors on the CPU give back, so that the next ones find it warm.

    By default glibc returns large blocks to the system as soon as they are free, and the system hands out zeros, page
    by page, when they are wanted again. A network's passes allocate the same sizes over and over: on two fast cores
    these page faults take a sixth of an attack's time. Call it once, before the first large tensors are made; it holds
    for the whole process and for everything in it that calls malloc, cannot be taken back, and leaves the resident set
    at its peak. `emr train`, `emr evaluate` and `emr demo` call it. The memory of a GPU has an allocator of its own and
    is not concerned.

    Returns:
        Whether the C library took the request; False where it is not glibc's (macOS, Windows, musl). With another
        allocator preloaded (jemalloc, tcmalloc) it changes nothing, and nothing is needed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    # -1: never; and no block from anywhere but the heap.
    settings = ((_TRIM_THRESHOLD, -1), (_TOP_PAD, _PAD), (_MMAP_MAX, 0))
    return all([bool(mallopt(parameter, value)) for parameter, value in settings])
