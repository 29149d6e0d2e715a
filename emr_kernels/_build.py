"""Compiles the extension with ninja; used by setup.py ahead of time and by `_extension` on first use.

Needs the standard library alone: setup.py runs it where neither torch nor this package can be imported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

OPS_LIBRARY = "libemr_ops.so"
FACTS_MODULE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
MINIMUM_TORCH = (2, 11)
# What the extension is compiled for: this version of the stable ABI, and so every later release.
TORCH_TARGET_VERSION = "0x020b000000000000"

_WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized")
# No contraction of a * b + c: every instruction set then rounds as PyTorch's own operators do.
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DNDEBUG", *_WARNINGS)

_FIND_TORCH = """
import importlib.util, json
spec = importlib.util.find_spec("torch")
print(json.dumps(list(spec.submodule_search_locations) if spec and spec.submodule_search_locations else []))
"""


class BuildError(RuntimeError):
    """The extension cannot be built here; the message says why."""


@dataclass(frozen=True)
class Toolchain:
    """What a build needs.

    Attributes:
        torch: the folder of the installed torch.
        torch_version: its version.
        compiler: the C++ compiler.
        ninja: the ninja executable.
    """

    torch: Path
    torch_version: str
    compiler: str
    ninja: str


def find_torch(python: str = sys.executable) -> tuple[Path, str]:
    """Folder and version of the torch that an interpreter would import, without importing it.

    pip's build isolation hides the environment's packages through two variables; without them they are there again.

    Raises:
        BuildError: if there is none, or it is too old.
    """
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    found = subprocess.run([python, "-c", _FIND_TORCH], env=environment, capture_output=True, text=True, cwd="/")
    folders = json.loads(found.stdout) if found.returncode == 0 else []
    if not folders:
        raise BuildError(
            f"no torch for {python}; build tools with an interpreter of their own (uv, python -m build) "
            "need --no-build-isolation"
        )
    folder = Path(folders[0])
    match = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (folder / "version.py").read_text())
    version = match.group(1) if match else "0"
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < MINIMUM_TORCH:
        raise BuildError(f"torch {version} is too old; expected {'.'.join(map(str, MINIMUM_TORCH))} or later")
    return folder, version


def find_toolchain(torch: tuple[Path, str] | None = None) -> Toolchain:
    """Torch, compiler and ninja.

    Args:
        torch: the torch to compile against; None: the one this interpreter would import.

    Raises:
        BuildError: if one of them is missing.
    """
    if sys.platform == "win32":
        raise BuildError("the extension is not built on Windows")
    folder, version = torch or find_torch()
    wanted = os.environ.get("CXX", "").split()
    compiler = next((c for c in (*wanted[-1:], "c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        raise BuildError("no C++ compiler (looked for $CXX, c++, g++ and clang++)")
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if ninja is None:
        raise BuildError("no ninja (pip install ninja)")
    return Toolchain(folder, version, compiler, ninja)


def source_folder() -> Path:
    """The C++ sources: beside this file in an installed package, one level up in a checkout.

    Raises:
        BuildError: if they are in neither place.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "csrc", here.parent / "csrc"):
        if (folder / "bindings.cpp").is_file():
            return folder
    raise BuildError(f"no C++ sources beside {here}")


def _quote(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_file(tools: Toolchain, sources: Path, output: Path, package_version: str) -> str:
    includes = f"-isystem {_quote(tools.torch / 'include')}"
    python = f"-isystem {_quote(sysconfig.get_path('include'))}"
    defines = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
    facts = f'-DEMR_VERSION=\\"{package_version}\\" -DEMR_BUILT_WITH_TORCH=\\"{tools.torch_version}\\"'
    shared = "-shared" if sys.platform != "darwin" else "-dynamiclib -undefined dynamic_lookup"
    libraries = f"-L{_quote(tools.torch / 'lib')} -ltorch_cpu"
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {tools.compiler} {' '.join(_FLAGS)} {includes} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {tools.compiler} {shared} $in -o $out $libraries",
    ]

    def target(name: str, files: list[Path], extra: str, libraries: str) -> None:
        objects = [f"{file.parent.name}_{file.name}.o" for file in files]
        for file, obj in zip(files, objects, strict=True):
            lines.extend((f"build {obj}: compile {_quote(file)}", f"  extra = {extra}"))
        lines.extend((f"build {_quote(output / name)}: link {' '.join(objects)}", f"  libraries = {libraries}"))

    target(OPS_LIBRARY, sorted((sources / "cpu").glob("*.cpp")), defines, libraries)
    target(FACTS_MODULE, [sources / "bindings.cpp"], f"{python} {facts}", "")
    return "\n".join(lines) + "\n"


def build(tools: Toolchain, work: Path, output: Path, package_version: str) -> None:
    """Compile the operators' library and the module of build facts into a folder.

    Args:
        tools: from `find_toolchain`.
        work: folder for objects; a second build there compiles only what changed.
        output: folder for the two libraries.
        package_version: version of this package, told by the facts.

    Raises:
        BuildError: with the compiler's words, if it fails.
    """
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    text = _ninja_file(tools, source_folder(), output.resolve(), package_version)
    (work / "build.ninja").write_text(text)
    jobs = os.environ.get("MAX_JOBS")
    command = [tools.ninja, "-C", str(work), *(["-j", jobs] if jobs else [])]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{result.stdout[-4000:]}")
