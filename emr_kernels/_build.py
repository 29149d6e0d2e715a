"""Compiles the extension with ninja; used by setup.py ahead of time and by `_extension` on first use.

The CPU's operators, the GPU's and the module of build facts are three libraries. Needs the standard library alone:
setup.py runs it where neither torch nor this package can be imported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import _nvcc
from ._nvcc import BuildError as BuildError

OPS_LIBRARY = "libemr_ops.so"
CUDA_LIBRARY = "libemr_cuda.so"
#: What became of the CUDA kernels, beside the libraries: see `read_report`.
CUDA_REPORT = "emr_cuda.json"
FACTS_MODULE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
MINIMUM_TORCH = (2, 11)
# What the extension is compiled for: this version of the stable ABI, and so every later release.
TORCH_TARGET_VERSION = "0x020b000000000000"

_WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized")
# No contraction of a * b + c: every instruction set then rounds as PyTorch's own operators do.
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DNDEBUG", *_WARNINGS)
# -fmad=false for the same reason: these kernels wait for memory, and a GPU's results can be compared bit for bit.
_CUDA_FLAGS = (
    "-std=c++20 -O2 -fmad=false -lineinfo -DNDEBUG -Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra,-Wno-unused-parameter",
)

_FIND_TORCH = """
import importlib.util, json
spec = importlib.util.find_spec("torch")
print(json.dumps(list(spec.submodule_search_locations) if spec and spec.submodule_search_locations else []))
"""


@dataclass(frozen=True)
class Toolchain:
    """What a build needs.

    Attributes:
        torch: the folder of the installed torch.
        torch_version: its version.
        compiler: the C++ compiler.
        ninja: the ninja executable.
        nvcc: the CUDA compiler, None where no CUDA kernels are built.
        no_cuda: why none are built, None where they are.
    """

    torch: Path
    torch_version: str
    compiler: str
    ninja: str
    nvcc: _nvcc.Nvcc | None = None
    no_cuda: str | None = "not asked for"


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


def _torch_cuda(folder: Path) -> str | None:
    """The CUDA version a torch is built for, None for a build without CUDA."""
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)", (folder / "version.py").read_text(), re.MULTILINE)
    return match.group(1) if match else None


def find_toolchain(torch: tuple[Path, str] | None = None) -> Toolchain:
    """Torch, compiler, ninja, and nvcc where CUDA kernels can be built.

    Args:
        torch: the torch to compile against; None: the one this interpreter would import.

    Raises:
        BuildError: if one of them is missing; nvcc, only where EMR_CUDA is 1.
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
    tools = Toolchain(folder, version, compiler, ninja)
    try:
        return replace(tools, nvcc=_nvcc.find_nvcc(version, _torch_cuda(folder)), no_cuda=None)
    except BuildError as error:
        if os.environ.get("EMR_CUDA") not in (None, "", "0"):
            raise
        return replace(tools, no_cuda=str(error))


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


def _jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def _ninja_file(tools: Toolchain, sources: Path, output: Path, package_version: str) -> str:
    includes = f"-isystem {_quote(tools.torch / 'include')}"
    python = f"-isystem {_quote(sysconfig.get_path('include'))}"
    defines = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
    architectures = ";".join(tools.nvcc.architectures) if tools.nvcc else ""
    facts = (
        f'-DEMR_VERSION=\\"{package_version}\\" -DEMR_BUILT_WITH_TORCH=\\"{tools.torch_version}\\" '
        f"'-DEMR_CUDA_ARCHITECTURES=\"{architectures}\"'"
    )
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
        objects = [_object(file) for file in files]
        for file, obj in zip(files, objects, strict=True):
            lines.extend((f"build {obj}: compile {_quote(file)}", f"  extra = {extra}"))
        lines.extend((f"build {_quote(output / name)}: link {' '.join(objects)}", f"  libraries = {libraries}"))

    target(OPS_LIBRARY, sorted((sources / "cpu").glob("*.cpp")), defines, libraries)
    target(FACTS_MODULE, [sources / "bindings.cpp"], f"{python} {facts}", "")
    if tools.nvcc is not None:
        lines += _cuda_lines(tools, tools.nvcc, sources, output, f"{includes} {defines}", libraries)
    return "\n".join(lines) + "\n"


def _cuda_lines(
    tools: Toolchain, nvcc: _nvcc.Nvcc, sources: Path, output: Path, options: str, libraries: str
) -> list[str]:
    files = _cuda_sources(sources)
    threads = max(1, min(len(nvcc.architectures), _jobs() // max(1, len(files))))
    host = f"-ccbin={tools.compiler} " if os.environ.get("CXX") and not os.environ.get("NVCC_CCBIN") else ""
    command = f"{_quote(nvcc.path)} {host}{' '.join(_CUDA_FLAGS)} {nvcc.flags} --threads={threads} {options}"
    # The report of ptxas is kept beside the object, and shown where the compiler fails.
    lines = [
        "rule cuda_compile",
        f"  command = {command} -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || {{ cat $out.log; false; }}",
        "  depfile = $out.d",
        "  deps = gcc",
        # The CUDA runtime is linked in, so that only torch's own libraries have to be found at run time.
        "rule cuda_link",
        f"  command = {_quote(nvcc.path)} {host}-shared -cudart=static -nodlink $in -o $out -Xlinker=-z,defs "
        f"{libraries} -L$stub -ltorch_cuda",
    ]
    stub, depends = tools.torch / "lib", ""
    if not (stub / "libtorch_cuda.so").exists():
        stub, depends = Path("stub"), " | stub/libtorch_cuda.so"
        lines += [
            "rule stub",
            f"  command = {tools.compiler} -shared -fPIC -Wl,-soname,libtorch_cuda.so $in -o $out",
            f"build stub/libtorch_cuda.so: stub {_quote(sources / 'cuda' / 'torch_cuda_stub.cpp')}",
        ]
    lines += [f"build {_object(file)}: cuda_compile {_quote(file)}" for file in files]
    objects = " ".join(_object(file) for file in files)
    return [*lines, f"build {_quote(output / CUDA_LIBRARY)}: cuda_link {objects}{depends}", f"  stub = {_quote(stub)}"]


def _object(file: Path) -> str:
    return f"{file.parent.name}_{file.name}.o"


def _cuda_sources(sources: Path) -> list[Path]:
    return sorted((sources / "cuda").glob("*.cu"))


def build(tools: Toolchain, work: Path, output: Path, package_version: str, libraries: Sequence[str] = ()) -> Toolchain:
    """Compile the operators' libraries and the module of build facts into a folder, and a report on the CUDA kernels.

    Args:
        tools: from `find_toolchain`.
        work: folder for objects; a second build there compiles only what changed.
        output: folder for the libraries.
        package_version: version of this package, told by the facts.
        libraries: file names of those wanted; empty: all.

    Returns:
        tools; without nvcc, and with the reason, if the CUDA kernels failed and EMR_CUDA does not demand them.

    Raises:
        BuildError: with the compiler's words, if it fails.
    """
    sources = source_folder()
    targets = [str(output.resolve() / name) for name in libraries]
    failure = _run_ninja(tools, sources, work, output, package_version, targets)
    if failure and tools.nvcc is not None and not _nvcc.forced():
        without = replace(tools, nvcc=None, no_cuda=f"nvcc failed: {failure}")
        if _run_ninja(without, sources, work, output, package_version, targets) is None:
            tools, failure = without, None
    if failure:
        raise BuildError(failure)
    _write_report(tools, sources, work, output)
    return tools


def _run_ninja(
    tools: Toolchain, sources: Path, work: Path, output: Path, package_version: str, targets: list[str]
) -> str | None:
    """The compiler's words if it fails."""
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(_ninja_file(tools, sources, output.resolve(), package_version))
    # Everything that can be built, also after a failure: the CPU's operators do not wait for the GPU's.
    jobs = ["-j", str(_jobs())] if os.environ.get("MAX_JOBS") else []
    command = [tools.ninja, "-C", str(work), "-k", "0", *jobs, *targets]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return f"{' '.join(command)} failed:\n{result.stdout[-4000:]}" if result.returncode != 0 else None


def _write_report(tools: Toolchain, sources: Path, work: Path, output: Path) -> None:
    report: dict[str, Any] = {"reason": tools.no_cuda, "nvcc": None, "architectures": [], "kernels": []}
    if tools.nvcc is None:
        (output / CUDA_LIBRARY).unlink(missing_ok=True)
    else:
        logs = ((file, (work / f"{_object(file)}.log").read_text()) for file in _cuda_sources(sources))
        report["nvcc"] = tools.nvcc.version
        report["architectures"] = list(tools.nvcc.architectures)
        report["kernels"] = _nvcc.kernel_reports(logs)
    (output / CUDA_REPORT).write_text(json.dumps(report, indent=1) + "\n")


def read_report(folder: Path) -> dict[str, Any]:
    """What became of the CUDA kernels that were built into a folder; empty where nothing is told.

    `reason` why there are none, or None; version of `nvcc`; `architectures`; `kernels` as `_nvcc.kernel_reports`.
    """
    try:
        report: dict[str, Any] = json.loads((folder / CUDA_REPORT).read_text())
    except (OSError, ValueError):
        return {}
    return report
