"""info(): what it says agrees with what is loaded."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from emr_kernels import _extension, ops
from emr_kernels._occupancy import occupancy
from emr_kernels.info import KernelInfo, info


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_info_agrees_with_what_is_loaded() -> None:
    ops.pack_bits(torch.zeros(8, dtype=torch.bool))
    state = info()
    assert state.torch == torch.__version__
    assert state.threads == torch.get_num_threads()
    assert {entry.operator for entry in state.operators} >= {"affine_relu", "affine_relu_vjp", "pack_bits"}
    backends = {entry.backend for entry in state.operators if entry.device == "cpu"}
    if state.library is None:
        assert state.reason and backends == {"reference"} and not state.build
    else:
        assert state.reason is None and backends == {"cpu"}
        assert state.build["instruction_set"] in state.build["instruction_sets"]


def test_occupancy() -> None:
    # 32 registers: 2048 threads take all 65536. 40: 5 units of 256 a warp, 12 warps a partition, 48 of 64.
    assert occupancy("9.0", 32, 0, 256) == 1.0
    assert occupancy("8.0", 40, 0, 256) == 0.75
    # 100: 13 units a warp, 4 warps a partition, 2 blocks of 8 warps.
    assert occupancy("9.0a", 100, 0, 256) == 0.25
    # 255: two warps a partition, one block.
    assert occupancy("10.0", 255, 0, 256) == 0.125
    # Four blocks of 40 KiB and the system's 1 KiB in 164 KiB; five in 228 KiB.
    assert occupancy("8.0", 32, 40 << 10, 256) == 0.5
    assert occupancy("9.0", 32, 40 << 10, 256) == 0.625
    # 1536 threads at most, 16 blocks at most.
    assert occupancy("8.6", 40, 0, 256) == 1.0
    assert occupancy("8.6", 16, 0, 64) == 16 * 64 / 1536
    assert occupancy("9.9", 32, 0, 256) is None


def test_table_of_kernels() -> None:
    kernels = (
        KernelInfo("one_kernel<float>", "8.0", 256, 40, 0, 0, 0.75),
        KernelInfo("one_kernel<float>", "9.0", 256, 32, 8192, 16, 1.0),
        KernelInfo("other_kernel", "9.0", None, 255, 0, 0, None),
    )
    lines = str(dataclasses.replace(info(), kernels=kernels)).splitlines()[-3:]
    assert [line.split() for line in lines] == [
        ["8.0", "9.0"],
        ["one_kernel<float>", "256", "40", "0", "75%", "32", "+16", "8192", "100%"],
        ["other_kernel", "?", "255", "0", "?"],
    ]


def test_table_says_why_there_are_no_cuda_kernels() -> None:
    state = info()
    assert (state.cuda_library is None) == (state.cuda_reason is not None)
    if torch.version.cuda is None:
        assert f"none: {state.cuda_reason}" in str(state)


def test_table_names_every_operator() -> None:
    table = str(info())
    for name in ("emr_kernels", "torch", "EMR_BACKEND", "library", *(entry.operator for entry in info().operators)):
        assert name in table


def test_module_prints_the_table() -> None:
    result = run("import runpy; runpy.run_module('emr_kernels', run_name='__main__')", EMR_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    assert "affine_relu_vjp" in result.stdout and "EMR_BACKEND is 'reference'" in result.stdout


def test_unknown_backend() -> None:
    result = run("import emr_kernels.ops", EMR_BACKEND="gpu")
    assert "ValueError: EMR_BACKEND is 'gpu'; expected one of reference, cpu, triton, cuda, or unset" in result.stderr


def test_unknown_instruction_set() -> None:
    ops.pack_bits(torch.zeros(8, dtype=torch.bool))
    if _extension.library is None:
        pytest.skip(str(_extension.reason))
    result = run("import torch; from emr_kernels import ops; ops.affine_relu(torch.ones(3))", EMR_CPU_ISA="avx1024")
    assert result.returncode != 0
    names = str(info().build["instruction_sets"][0])
    assert f"EMR_CPU_ISA is 'avx1024'; expected {names}," in result.stderr


USE = "import torch; from emr_kernels import ops; print(ops.affine_relu(torch.tensor([-1.0, 2.0]))[0].tolist())"


def test_reference_backend() -> None:
    result = run(USE + "; from emr_kernels import _extension as e; print(e.library)", EMR_BACKEND="reference")
    assert result.stdout.split("\n")[:2] == ["[0.0, 2.0]", "None"], result.stderr


def test_forced_backend_that_is_missing() -> None:
    code = "from emr_kernels import _extension as e; e.library = None; e.pending = False; e.reason = 'gone'; " + USE
    result = run(code, EMR_BACKEND="cpu", EMR_BUILD="0")
    assert "EMR_BACKEND is 'cpu', but the compiled operators are missing: gone" in result.stderr


def test_broken_library_leaves_the_reference(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    broken = Path(str(tmp_path)) / "libemr_ops.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_extension, "library", None)
    monkeypatch.setattr(_extension, "reason", None)
    monkeypatch.setattr(_extension, "pending", False)
    _extension._load(broken)
    assert _extension.library is None
    assert str(broken) in str(_extension.reason) and torch.__version__ in str(_extension.reason)
    assert ops.affine_relu(torch.tensor([-1.0, 2.0]))[0].tolist() == [0.0, 2.0]
