"""info(): what it says agrees with what is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from emr_kernels import _extension, ops
from emr_kernels.info import info


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
