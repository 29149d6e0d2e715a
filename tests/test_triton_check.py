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


@triton.autotune([triton.Config({"BLOCK": 128}, num_warps=2), triton.Config({"BLOCK": 256})], key=["n"])
@triton.jit
def tuned_kernel(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < n) * n + 1, mask=i < n)


def examples():
    x = torch.empty(4096, device="meta")
    common.launch(good_kernel, 1, x, x, 4096, BLOCK=256)
    common.launch(untyped_kernel, 1, x, x, 4096, BLOCK=256)
    common.launch(tuned_kernel, lambda meta: (triton.cdiv(4096, meta["BLOCK"]),), x, x, 4096)
    common.launch(spilling_kernel, 1, x, x, 4096, BLOCK=16384, num_warps=1)
"""

FORGOTTEN = """
import triton


@triton.jit
def forgotten_kernel(x):
    pass
"""


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "TRITON_CACHE_DIR": str(folder / "cache")}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def test_tells_what_fails(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    (tmp_path / "forgotten.py").write_text(FORGOTTEN)
    options = ("--capability=90", "--jobs=1")
    result = run("-m", "emr_kernels.triton.check", "kernels", "forgotten", *options, folder=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    passed, failures = result.stdout.split("3 failed:")
    assert "forgotten_kernel is in no example of forgotten" in failures
    assert "untyped_kernel *fp32 BLOCK=256 warps=4: sm_90 FAILED: CompilationError" in failures
    assert "spilling_kernel *fp32 BLOCK=16384 warps=1: sm_90 FAILED: RuntimeError: spills" in failures
    assert "good_kernel" not in failures and "tuned_kernel" not in failures
    for name in ("good_kernel *fp32 BLOCK=256 warps=4", "tuned_kernel *fp32 BLOCK=128 warps=2"):
        assert re.search(rf"{re.escape(name)}: sm_90 \d+ registers, 0 bytes shared", passed)
    assert "tuned_kernel *fp32 BLOCK=256 warps=4" in passed


CONTRACTED = """
from emr_kernels.triton import check

kernel = check.specialisations("emr_kernels.triton.affine_relu")[0]
code = kernel.compile(90).asm["ptx"]
print(kernel.name, code.count("mul.rn.f32") > 0, code.count("add.rn.f32") > 0, code.count("fma."))
"""


def test_products_and_sums_are_not_contracted(tmp_path: Path) -> None:
    result = run("-c", CONTRACTED, folder=tmp_path)
    assert result.stdout == "affine_relu_kernel True True 0\n", result.stdout + result.stderr


def test_refuses_interpreted_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from emr_kernels.triton import check

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        check.main([])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
