"""The build: what it finds, what it says when something is missing, and that a first use builds and is reused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emr_kernels import _build

ROOT = Path(__file__).parent.parent


def interpreter(folder: Path, packages: Path) -> str:
    """A stand-in for an interpreter that sees the packages of one folder only."""
    script = folder / "python"
    script.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -S -c "import sys; sys.path.insert(0, \'{packages}\'); exec(sys.argv[1])" '
        '"$2"\n'
    )
    script.chmod(0o755)
    return str(script)


def fake_torch(folder: Path, version: str) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")


def test_finds_the_installed_torch() -> None:
    folder, version = _build.find_torch()
    assert folder == Path(torch.__file__).parent
    assert version == torch.__version__


def test_finds_torch_through_build_isolation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_torch(tmp_path, "9.9.0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    assert _build.find_torch()[0] == Path(torch.__file__).parent


def test_no_torch(tmp_path: Path) -> None:
    with pytest.raises(_build.BuildError, match=r"no torch for .*--no-build-isolation"):
        _build.find_torch(interpreter(tmp_path, tmp_path))


def test_old_torch(tmp_path: Path) -> None:
    fake_torch(tmp_path, "2.10.1+cu128")
    with pytest.raises(_build.BuildError, match=r"torch 2.10.1\+cu128 is too old; expected 2.11"):
        _build.find_torch(interpreter(tmp_path, tmp_path))


def test_no_compiler_and_no_ninja(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = (tmp_path, "2.13.0")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(_build.BuildError, match=r"no C\+\+ compiler"):
        _build.find_toolchain(found)
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(_build.BuildError, match="no ninja"):
        _build.find_toolchain(found)


def toolchain_or_skip() -> _build.Toolchain:
    try:
        return _build.find_toolchain()
    except _build.BuildError as error:
        pytest.skip(str(error))


def test_compiler_errors_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = toolchain_or_skip()
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    for name in ("bindings.cpp", "cpu/bits.cpp"):
        (tmp_path / "csrc" / name).write_text("#error this does not compile\n")
    monkeypatch.setattr(_build, "source_folder", lambda: tmp_path / "csrc")
    with pytest.raises(_build.BuildError, match="this does not compile"):
        _build.build(tools, tmp_path / "work", tmp_path / "out", "0")


USE = """
import torch
from emr_kernels import _extension, ops
assert _extension.pending and _extension.library is None
assert ops.pack_bits(torch.tensor([False, True])).tolist() == [2]
print(_extension.library)
print(sorted(_extension.facts_module().facts()))
"""


#: Enough of csrc to build all libraries of a machine without CUDA, in seconds.
FEW = ("bindings.cpp", "ops.h", "layout.h", "formulas.h", "cpu/bits.cpp", "cpu/isa.h", "cpu/kernels.h", "cpu/layout.h")


def few_sources(folder: Path) -> Path:
    for name in FEW:
        target = folder / "csrc" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / "csrc" / name).read_bytes())
    return folder / "csrc"


def test_first_use_builds_once(tmp_path: Path) -> None:
    toolchain_or_skip()
    # A package of its own, so that nothing built ahead is found.
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "emr_kernels", tmp_path / "emr_kernels", ignore=ignored)
    few_sources(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "EMR_CACHE": str(tmp_path / "cache"), "EMR_CUDA": "0"}
    for name in ("EMR_BACKEND", "EMR_BUILD"):
        environment.pop(name, None)

    def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        settings = {**environment, **variables}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=settings, capture_output=True, text=True, cwd=tmp_path)

    asked = "import emr_kernels; state = emr_kernels.info(); print(state.library, state.reason, sep='\\n')"
    assert run(asked).stdout.splitlines() == ["None", "not built ahead; the first call of an operator builds it"]
    without = run(asked, PATH=str(tmp_path), CXX="").stdout.splitlines()
    assert without[0] == "None" and "cannot be on first use: no C++ compiler" in without[1]
    runs = [run(USE) for _ in range(2)]
    for result in runs:
        assert result.returncode == 0, result.stderr
        library, facts = result.stdout.splitlines()
        assert Path(library).is_relative_to(tmp_path / "cache")
        assert "instruction_set" in facts
    assert "compiling the CPU kernels" in runs[0].stderr
    assert "compiling" not in runs[1].stderr
    assert run(asked).stdout.splitlines() == [library, "None"]


def test_without_a_compiler_one_line_says_so(tmp_path: Path) -> None:
    code = """
import torch
from emr_kernels import _extension, ops
for _ in range(2):
    assert ops.affine_relu(torch.tensor([-1.0, 2.0]))[0].tolist() == [0.0, 2.0]
assert _extension.library is None
"""
    shutil.copytree(ROOT / "emr_kernels", tmp_path / "emr_kernels", ignore=shutil.ignore_patterns("*.so"))
    environment = {"PYTHONPATH": str(tmp_path), "PATH": str(tmp_path), "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    told = [line for line in result.stderr.splitlines() if "emr_kernels" in line]
    assert len(told) == 1 and "no C++ compiler (looked for $CXX, c++, g++ and clang++)" in told[0]
    assert "plain PyTorch" in told[0]


def test_compiles_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = replace(toolchain_or_skip(), nvcc=None)
    sources = few_sources(tmp_path)
    monkeypatch.setattr(_build, "source_folder", lambda: sources)
    built = []
    for _ in range(3):
        _build.build(tools, tmp_path / "work", tmp_path / "out", "0")
        built.append({file.name: file.stat().st_mtime_ns for file in (tmp_path / "work").glob("*.o")})
        if len(built) == 2:
            (sources / "cpu" / "bits.cpp").open("a").write("// changed\n")
    assert len(built[0]) == 2 and built[0] == built[1]
    assert {name for name in built[2] if built[2][name] != built[1][name]} == {"cpu_bits.cpp.o"}


def test_says_that_torch_is_missing() -> None:
    code = "import sys; sys.modules['torch'] = None; import emr_kernels"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: emr_kernels needs PyTorch 2.11 or later"), result.stderr


def test_distributions_contain_the_sources(tmp_path: Path) -> None:
    """An sdist and a wheel made from a copy, both without compiling."""
    pytest.importorskip("setuptools", "77")
    ignored = shutil.ignore_patterns(*(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "emr_cuda.json"))
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    code = "from setuptools import build_meta as b; print(b.build_sdist('out')); print(b.build_wheel('out'))"
    environment = {**os.environ, "EMR_BUILD": "0"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path / "copy")
    assert result.returncode == 0, result.stderr
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    assert any(name.endswith(".cuh") for name in sources)
    (sdist,) = (tmp_path / "copy" / "out").glob("*.tar.gz")
    (wheel,) = (tmp_path / "copy" / "out").glob("*.whl")
    with tarfile.open(sdist) as archive:
        packed = {name.split("/", 1)[-1] for name in archive.getnames()}
    installed = set(zipfile.ZipFile(wheel).namelist())
    assert sources | {"setup.py", "emr_kernels/_build.py", "emr_kernels/triton/common.py"} <= packed
    assert {f"emr_kernels/{name}" for name in sources} | {"emr_kernels/py.typed"} <= installed
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in packed | installed)


def test_torch_is_no_build_requirement() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = next(line for line in text.splitlines() if line.startswith("requires = "))
    assert "torch" not in requires
