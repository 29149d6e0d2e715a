"""Memory that tensors give back and take again, in processes of their own: the C library's setting holds for good."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

import emr_kernels

FAULTS = """
import resource
import torch
import emr_kernels

kept = {call}
size = 1 << 24
torch.zeros(size)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.zeros(size)
    torch.zeros(size // 2), torch.zeros(size // 2)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call: str) -> tuple[str, int]:
    """What the call returned, and the page faults of eight times 32 and four times 64 MiB of zeros after it."""
    done = subprocess.run([sys.executable, "-c", FAULTS.format(call=call)], capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept, int(count)


def test_kept_memory_is_warm() -> None:
    kept, count = faults("emr_kernels.keep_memory()")
    if kept == "False":
        pytest.skip("the C library is not glibc")
    _, default = faults("None")
    # 512 MiB in pages of 4 KiB, and of 2 MiB where the system hands out huge ones unasked.
    assert default > 512 // 2
    assert count < default / 4


@pytest.mark.parametrize("error", [AttributeError, TypeError, OSError])
def test_other_libraries_are_left_alone(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: None) -> None:
        raise error("no mallopt")

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert emr_kernels.keep_memory() is False
