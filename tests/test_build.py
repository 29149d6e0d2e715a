"""The build: what it finds, what it says when something is missing, and that a first use builds and is reused."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
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
import shutil, sys
from pathlib import Path
import torch
from emr_kernels import _extension, ops
assert _extension.pending and _extension.library is None
y, bits = ops.affine_relu(torch.tensor([-1.0, 2.0]))
assert y.tolist() == [0.0, 2.0] and bits.tolist() == [2]
print(_extension.library)
print(sorted(_extension.facts_module().facts()))
"""


def test_first_use_builds_once(tmp_path: Path) -> None:
    toolchain_or_skip()
    # A checkout of its own, so that nothing built ahead is found.
    for name in ("emr_kernels", "csrc"):
        (tmp_path / name).mkdir()
        for file in (ROOT / name).rglob("*"):
            if file.is_file() and file.suffix not in (".so", ".pyc"):
                target = tmp_path / name / file.relative_to(ROOT / name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "EMR_CACHE": str(tmp_path / "cache"), "EMR_CUDA": "0"}
    for name in ("EMR_BACKEND", "EMR_BUILD"):
        environment.pop(name, None)
    runs = [
        subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, cwd=tmp_path)
        for _ in range(2)
    ]
    for result in runs:
        assert result.returncode == 0, result.stderr
        library, facts = result.stdout.splitlines()
        assert Path(library).is_relative_to(tmp_path / "cache")
        assert "instruction_set" in facts
    assert "compiling the CPU kernels" in runs[0].stderr
    assert "compiling" not in runs[1].stderr


def test_torch_is_no_build_requirement() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = next(line for line in text.splitlines() if line.startswith("requires = "))
    assert "torch" not in requires
