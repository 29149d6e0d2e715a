"""The CUDA half of the build: what is found and asked for; where there is nvcc, that all kernels compile and link."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import cuda_check
from emr_kernels import _build, _extension, _nvcc

KNOWN = {"75", "80", "86", "90", "100", "120"}
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EMR_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (None, ("8.0", "9.0", "10.0+PTX")),
        ("", ("8.0", "9.0", "10.0+PTX")),
        ("9.0", ("9.0",)),
        ("8.0;9.0+PTX", ("8.0", "9.0+PTX")),
        ("8.0 8.6  9.0a ", ("8.0", "8.6", "9.0a")),
        ("12.0+ptx", ("12.0+PTX",)),
        ("9.0;9.0", ("9.0",)),
    ],
)
def test_architectures(listed: str | None, expected: tuple[str, ...]) -> None:
    assert _nvcc.parse_architectures(listed, "13.0", KNOWN) == expected


def test_architectures_that_an_older_nvcc_has() -> None:
    assert _nvcc.parse_architectures(None, "12.4", {"80", "90"}) == ("8.0", "9.0+PTX")
    with pytest.raises(_build.BuildError, match=r"has 10.0, which nvcc 12.4 does not compile for"):
        _nvcc.parse_architectures("10.0", "12.4", {"80", "90"})


@pytest.mark.parametrize("listed", ["Hopper", "90", "9.0-PTX", "native"])
def test_wrong_architectures(listed: str) -> None:
    with pytest.raises(_build.BuildError, match=f"is '{listed}'; expected entries such as 8.0"):
        _nvcc.parse_architectures(listed, "13.0", KNOWN)


def test_options_of_nvcc() -> None:
    flags = _nvcc.Nvcc("nvcc", "13.0", ("9.0a", "10.0+PTX")).flags
    assert flags == "'-gencode=arch=compute_90a,code=sm_90a' '-gencode=arch=compute_100,code=[sm_100,compute_100]'"


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, release: str = "13.0") -> str:
    """An nvcc that only tells its version."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "release {release}, V" || echo sm_80 sm_90 sm_100\n')
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder))
    return str(path)


def test_environment_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = stand_in(tmp_path, monkeypatch)
    with pytest.raises(_build.BuildError, match=r"torch 2.13.0\+cpu is a build without CUDA"):
        _nvcc.find_nvcc("2.13.0+cpu", None)
    expected = _nvcc.Nvcc(path, "13.0", ("8.0", "9.0", "10.0+PTX"))
    assert _nvcc.find_nvcc("2.13.0", "13.2") == expected
    monkeypatch.setenv("EMR_CUDA", "1")
    assert _nvcc.find_nvcc("2.13.0+cpu", None) == expected
    monkeypatch.setenv("EMR_CUDA", "0")
    with pytest.raises(_build.BuildError, match="EMR_CUDA is 0"):
        _nvcc.find_nvcc("2.13.0", "13.0")
    monkeypatch.setenv("EMR_CUDA", "yes")
    with pytest.raises(_build.BuildError, match="EMR_CUDA is 'yes'; expected 0, 1 or unset"):
        _nvcc.find_nvcc("2.13.0", "13.0")


def test_other_major_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(tmp_path, monkeypatch, release="12.8")
    with pytest.raises(_build.BuildError, match=r"built for CUDA 13.0, .*nvcc is CUDA 12.8; expected the same major"):
        _nvcc.find_nvcc("2.13.0", "13.0")


def test_no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(_build.BuildError, match="no nvcc"):
        _nvcc.find_nvcc("2.13.0", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_build.BuildError, match=f"CUDA_HOME is {tmp_path}, and there is no nvcc"):
        _nvcc.find_nvcc("2.13.0", "13.0")


def test_toolchain_without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def find(*_: object) -> _nvcc.Nvcc:
        raise _build.BuildError("no nvcc anywhere")

    monkeypatch.setattr(_nvcc, "find_nvcc", find)
    try:
        tools = _build.find_toolchain()
    except _build.BuildError as error:
        pytest.skip(str(error))
    assert tools.nvcc is None and tools.no_cuda == "no nvcc anywhere"
    monkeypatch.setenv("EMR_CUDA", "1")
    with pytest.raises(_build.BuildError, match="no nvcc anywhere"):
        _build.find_toolchain()


@pytest.mark.parametrize(("text", "expected"), [("'13.0'", "13.0"), ("None", None)])
def test_cuda_version_of_torch(tmp_path: Path, text: str, expected: str | None) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {text}\nhip = '6'\n")
    assert _build._torch_cuda(tmp_path) == expected


LOG = """\
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_ZN3emr4cuda11sums_kernelILi4EEEvPKfl' for 'sm_90a'
ptxas info    : Function properties for _ZN3emr4cuda11sums_kernelILi4EEEvPKfl
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 23 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'other' for 'sm_100'
ptxas info    : Function properties for other
    48 bytes stack frame, 16 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 376 bytes cmem[0]
"""


SOURCE = """
constexpr int kMost = 512;
template <int n>
__global__ void __launch_bounds__(kMost, 1) sums_kernel(const float* a) {}
__global__ void __launch_bounds__(kThreads)
    other(int) {}
"""


def test_report_of_ptxas(tmp_path: Path) -> None:
    (tmp_path / "sums.cu").write_text(SOURCE)
    (tmp_path / "lanes.h").write_text("inline constexpr int kThreads = 128;\nconstexpr int kMost = 3;\n")
    first, second = _nvcc.kernel_reports([(tmp_path / "sums.cu", LOG)])
    if first["kernel"] == "sums_kernel<4>":  # else there is nothing to demangle with
        assert first["threads"] == 512
    assert second["threads"] == 128
    assert (first["architecture"], first["registers"], first["shared"]) == ("9.0a", 23, 1024)
    assert (second["architecture"], second["registers"], second["shared"]) == ("10.0", 255, 0)
    assert (second["stack"], second["spill_stores"], second["spill_loads"]) == (48, 16, 32)
    assert _nvcc.spilling([first, second]) == [second]


@pytest.fixture(scope="module")
def compiled() -> Mapping[str, Any]:
    """The report on the CUDA kernels, compiled and linked for every architecture; skips without nvcc."""
    try:
        _nvcc.locate()
    except _build.BuildError as error:
        pytest.skip(f"the CUDA kernels are not compiled here: {error}")
    return cuda_check.compile_all()


def test_compiles_and_links(compiled: Mapping[str, Any]) -> None:
    assert compiled["reason"] is None
    assert compiled["architectures"] == ["8.0", "9.0", "10.0+PTX"]
    # The linker was told to leave no symbol undefined.
    assert (cuda_check.FOLDER / "out" / _build.CUDA_LIBRARY).stat().st_size > 0
    for architecture in ("8.0", "9.0", "10.0"):
        names = {k["kernel"] for k in compiled["kernels"] if k["architecture"] == architecture}
        assert any("pack_bits_kernel<true>" in name for name in names)
    assert all(k["threads"] for k in compiled["kernels"])
    assert {k["source"] for k in compiled["kernels"]} == {f.name for f in (ROOT / "csrc" / "cuda").glob("*.cu")}


def test_no_kernel_spills(compiled: Mapping[str, Any]) -> None:
    assert _nvcc.spilling(compiled["kernels"]) == []


USE = """
import torch
from emr_kernels import _extension, info, ops
y, _ = ops.affine_relu(torch.tensor([-1.0, 2.0]))
assert y.tolist() == [0.0, 2.0]
print(_extension.library)
print(_extension.cuda_library)
print(_extension.cuda_reason)
print(info().build["cuda_architectures"])
"""


def test_import_beside_a_torch_without_cuda(compiled: Mapping[str, Any], tmp_path: Path) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    package = tmp_path / "emr_kernels"
    shutil.copytree(
        ROOT / "emr_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "emr_cuda.json")
    )
    _extension.prepare()
    if _extension.library is None:
        pytest.skip(f"no compiled operators: {_extension.reason}")
    for file in (_extension.library, *(cuda_check.FOLDER / "out").iterdir()):
        shutil.copy2(file, package)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("EMR_BACKEND", None)
    result = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        str(package / _build.OPS_LIBRARY),
        "None",
        f"torch {torch.__version__} is a build without CUDA",
        "['8.0', '9.0', '10.0+PTX']",
    ]


def test_nvcc_failure_leaves_the_cpu_kernels(
    compiled: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "csrc").mkdir()
    for name in ("cpu", "cuda"):
        (tmp_path / "csrc" / name).mkdir()
    (tmp_path / "csrc" / "bindings.cpp").write_text("int facts() { return 1; }\n")
    (tmp_path / "csrc" / "cpu" / "one.cpp").write_text("int one() { return 1; }\n")
    (tmp_path / "csrc" / "cuda" / "two.cu").write_text("#error this kernel does not compile\n")
    shutil.copy2(ROOT / "csrc" / "cuda" / "torch_cuda_stub.cpp", tmp_path / "csrc" / "cuda")
    monkeypatch.setattr(_build, "source_folder", lambda: tmp_path / "csrc")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setenv("EMR_CUDA", "1")
    tools = _build.find_toolchain()
    with pytest.raises(_build.BuildError, match="this kernel does not compile"):
        _build.build(tools, tmp_path / "work", tmp_path / "out", "0")
    monkeypatch.delenv("EMR_CUDA")
    done = _build.build(tools, tmp_path / "work", tmp_path / "out", "0")
    assert done.nvcc is None and "this kernel does not compile" in str(done.no_cuda)
    assert (tmp_path / "out" / _build.OPS_LIBRARY).exists()
    assert "this kernel does not compile" in _build.read_report(tmp_path / "out")["reason"]
