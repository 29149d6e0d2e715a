"""The backends that can run here, as parameters of the operators' tests.

With a GPU every backend but the CPU's runs on it. Without one the Triton kernels run in Triton's interpreter, on CPU
tensors, which takes milliseconds for every program: launch tens of them in a test, not hundreds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from emr_kernels import _extension
from emr_kernels.ops import _dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Backend:
    """One implementation of every operator, and the device its tensors live on."""

    name: str
    device: str

    def __str__(self) -> str:
        return f"{self.name}-{self.device}"

    @property
    def interpreted(self) -> bool:
        """Whether it runs in Triton's interpreter."""
        return self.name == "triton" and self.device == "cpu"

    def kernel(self, name: str, dtype: torch.dtype) -> Callable[..., Any]:
        """The implementation of one operator, with the operator's arguments; skips the test where there is none."""
        if dtype == torch.float64 and self.name in ("triton", "cuda"):
            pytest.skip("float64 is for the reference and the CPU")
        if self.name in ("cpu", "cuda"):
            _extension.prepare()
        try:
            return _dispatch.operators[name].kernel(self.name)
        except _dispatch.BackendUnavailableError as error:
            pytest.skip(f"{name} on {self.name}: {error}")

    def rounds_like(self, got: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether a result on this backend is that of the reference, on the CPU, to the bit; NaN equals NaN.

        The interpreter truncates to bfloat16 where a GPU rounds: one unit in the last place less is right there.
        """
        got = got.cpu()
        same = (got == expected) | (got.isnan() & expected.isnan())
        if self.interpreted and got.dtype == torch.bfloat16:
            # Neighbours of one sign have neighbouring patterns.
            same |= expected.view(torch.int16).int() - got.contiguous().view(torch.int16).int() == 1
        return got.shape == expected.shape and bool(same.all())


#: Every backend that is tested against the reference here.
BACKENDS = (
    Backend("cpu", "cpu"),
    *(
        (Backend("triton", "cuda"), Backend("cuda", "cuda"))
        if torch.cuda.is_available()
        else (Backend("triton", "cpu"),)
    ),
)


def run_on_instruction_set(index: int, files: list[str], expression: str | None = None) -> None:
    """Run the tests of these files, those that pytest's `-k` expression selects, on one of the processor's lower
    instruction sets. Skips the test where it is not compiled in, not supported, or what all tests run on."""
    _extension.prepare()
    module = _extension.facts_module() if _extension.library is not None else None
    if module is None:
        pytest.skip(f"no compiled operators: {_extension.reason}")
    facts = module.facts()
    names = facts["instruction_sets"]
    if index >= len(names) or names.index(facts["instruction_set"]) <= index:
        pytest.skip("not compiled in, not supported here, or what the other tests run")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    command += ["-k", expression] if expression else []
    environment = {**os.environ, "EMR_CPU_ISA": names[index], "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout
