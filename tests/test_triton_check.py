"""The offline compilation of Triton kernels: what does not compile, spills or is forgotten fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton cannot be imported")

KERNELS = """
import torch
import triton
import triton.language as tl

from emr_kernels.triton import common


@triton.jit
def good_kernel(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)


@triton.jit
def untyped_kernel(x, n, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.load(n))


@triton.jit
def spilling_kernel(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i)
    # Every element is needed again after the sum: 512 registers a thread.
    tl.store(x + i, a * tl.sum(a))


def examples():
    x = torch.empty(4096, device="meta")
    common.launch(good_kernel, 1, x, x, 4096, BLOCK=256)
    common.launch(untyped_kernel, 1, x, x, 4096, BLOCK=256)
    common.launch(spilling_kernel, 1, x, x, 4096, BLOCK=16384, num_warps=1)
"""

FORGOTTEN = """
import triton


@triton.jit
def forgotten_kernel(x):
    pass
"""


def test_tells_what_fails(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    (tmp_path / "forgotten.py").write_text(FORGOTTEN)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "emr_kernels.triton.check", "kernels", "forgotten", "--capability=90", "--jobs=1"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    failures = result.stdout[result.stdout.index("3 failed:") :]
    assert "forgotten_kernel is in no example of forgotten" in failures
    assert "untyped_kernel *fp32 BLOCK=256 warps=4: sm_90 FAILED: CompilationError" in failures
    assert "spilling_kernel *fp32 BLOCK=16384 warps=1: sm_90 FAILED: RuntimeError: spills" in failures
    assert "good_kernel" not in failures
    assert re.search(r"good_kernel \*fp32 BLOCK=256 warps=4: sm_90 \d+ registers, 0 bytes shared", result.stdout)


def test_refuses_interpreted_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from emr_kernels.triton import check

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        check.main([])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
