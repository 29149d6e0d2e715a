"""The CUDA half of the build: which nvcc, for which architectures, and what ptxas reports about each kernel.

Needs the standard library alone, like `_build`.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")

_FORMAT = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?", re.IGNORECASE)


class BuildError(RuntimeError):
    """The extension, or its CUDA half, cannot be built here; the message says why."""


@dataclass(frozen=True)
class Nvcc:
    """The CUDA compiler and what it compiles for.

    Attributes:
        path: of nvcc.
        version: of nvcc, "13.0".
        architectures: as in TORCH_CUDA_ARCH_LIST: "8.0", "9.0a", "10.0+PTX".
    """

    path: str
    version: str
    architectures: tuple[str, ...]

    @property
    def flags(self) -> str:
        """The -gencode options."""
        flags = []
        for architecture in self.architectures:
            number = _number(architecture)
            code = f"sm_{number}"
            if architecture.endswith("+PTX"):
                code = f"[{code},compute_{number}]"
            flags.append(f"'-gencode=arch=compute_{number},code={code}'")
        return " ".join(flags)


def _number(architecture: str) -> str:
    """10.0+PTX: 100; 9.0a: 90a."""
    return architecture.removesuffix("+PTX").replace(".", "")


def forced() -> bool | None:
    """What EMR_CUDA says: True for 1, False for 0, None where it is unset.

    Raises:
        BuildError: for anything else.
    """
    value = os.environ.get("EMR_CUDA", "")
    if value not in ("", "0", "1"):
        raise BuildError(f"EMR_CUDA is {value!r}; expected 0, 1 or unset")
    return None if value == "" else value == "1"


def find_nvcc(torch_version: str, torch_cuda: str | None) -> Nvcc:
    """The nvcc for the installed torch.

    Args:
        torch_version: for messages.
        torch_cuda: the CUDA version of torch, None for a CPU build.

    Raises:
        BuildError: if there shall be no CUDA kernels here, or cannot; the message says why.
    """
    force = forced()
    if force is False:
        raise BuildError("EMR_CUDA is 0")
    if torch_cuda is None and not force:
        raise BuildError(f"torch {torch_version} is a build without CUDA")
    path = locate()
    told = subprocess.run([path, "--version"], capture_output=True, text=True)
    match = re.search(r"release (\d+\.\d+)", told.stdout)
    if told.returncode != 0 or match is None:
        raise BuildError(f"{path} --version fails: {(told.stderr or told.stdout).strip()[-500:]}")
    version = match.group(1)
    if torch_cuda is not None and torch_cuda.split(".")[0] != version.split(".")[0]:
        raise BuildError(
            f"torch {torch_version} is built for CUDA {torch_cuda}, {path} is CUDA {version}; "
            "expected the same major version (CUDA_HOME names another toolkit)"
        )
    listed = subprocess.run([path, "--list-gpu-code"], capture_output=True, text=True)
    known = {code.removeprefix("sm_") for code in listed.stdout.split()}
    return Nvcc(path, version, parse_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), version, known))


def locate() -> str:
    """The path of nvcc.

    Raises:
        BuildError: if there is none.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(name)
        if home:
            path = Path(home) / "bin" / "nvcc"
            if not path.is_file():
                raise BuildError(f"{name} is {home}, and there is no nvcc in its bin")
            return str(path)
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise BuildError("no nvcc (looked in $CUDA_HOME, $CUDA_PATH, $PATH and /usr/local/cuda)")
    return found


def parse_architectures(listed: str | None, version: str, known: set[str]) -> tuple[str, ...]:
    """The architectures to compile for, in the order of the list.

    Args:
        listed: TORCH_CUDA_ARCH_LIST: entries such as 8.0, 9.0a or 10.0+PTX between ; or blanks. None or empty: the
            default ones that this nvcc knows, the newest with PTX.
        version: of nvcc, for messages.
        known: what nvcc compiles for: "80", "90".

    Raises:
        BuildError: for an entry that is not an architecture, or that nvcc does not know.
    """
    entries = re.split(r"[;,\s]+", (listed or "").strip())
    if entries == [""]:
        default = [a for a in DEFAULT_ARCHITECTURES if _number(a) in known]
        if not default:
            raise BuildError(f"nvcc {version} compiles for none of {', '.join(DEFAULT_ARCHITECTURES)}")
        return (*default[:-1], default[-1] + "+PTX")
    result: dict[str, None] = {}
    for entry in filter(None, entries):
        match = _FORMAT.fullmatch(entry)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST is {listed!r}; expected entries such as 8.0, 9.0a or 10.0+PTX, not {entry!r}"
            )
        major, minor, suffix, ptx = match.groups()
        if major + minor not in known:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST has {entry}, which nvcc {version} does not compile for")
        result[f"{major}.{minor}{suffix.lower()}{'+PTX' if ptx else ''}"] = None
    return tuple(result)


def launch_bounds(source: Path) -> dict[str, int]:
    """The threads of a block that each kernel of a source is declared for, as `__launch_bounds__` says.

    A constant is looked up in the source, then in the headers of its folder.
    """
    text = source.read_text()
    headers = "\n".join(file.read_text() for file in sorted(source.parent.iterdir()) if file.suffix in (".h", ".cuh"))
    # The last entry of a name stays: the source's own.
    constants = dict(re.findall(r"constexpr int (\w+) = (\d+);", f"{headers}\n{text}"))
    declared = re.findall(r"__launch_bounds__\((\w+)[^)]*\)\s+(\w+)\(", text)
    return {kernel: int(value) for bound, kernel in declared if (value := constants.get(bound, bound)).isdigit()}


def kernel_reports(logs: Iterable[tuple[Path, str]]) -> list[dict[str, Any]]:
    """What `ptxas -v` said of each kernel.

    Args:
        logs: for each source, its path and the compiler's output.

    Returns:
        For each kernel and architecture: kernel, source, architecture ("9.0"), registers of a thread, threads of a
        block (None where the source does not tell); and in bytes shared memory of a block, stack, spill_stores and
        spill_loads of a thread.
    """
    reports = []
    for source, text in logs:
        bounds = launch_bounds(source)
        for block in re.split(r"Compiling entry function ", text)[1:]:
            head = re.match(r"'(\w+)' for 'sm_(\w+)'", block)
            frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
            registers = re.search(r"Used (\d+) registers", block)
            shared = re.search(r"(\d+) bytes smem", block)
            if head is None or frame is None or registers is None:
                raise BuildError(f"{source.name}: ptxas reports in an unknown way: {block[:300]}")
            mangled, number = head.groups()
            name = _readable(mangled)
            digits = number.rstrip("af")
            reports.append(
                {
                    "kernel": name,
                    "source": source.name,
                    "threads": bounds.get(re.split(r"[<(]", name)[0].rpartition("::")[2]),
                    "architecture": f"{digits[:-1]}.{digits[-1]}{number[len(digits) :]}",
                    "registers": int(registers.group(1)),
                    "shared": int(shared.group(1)) if shared else 0,
                    "stack": int(frame.group(1)),
                    "spill_stores": int(frame.group(2)),
                    "spill_loads": int(frame.group(3)),
                }
            )
    return reports


def spilling(reports: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reports of kernels that keep registers in memory."""
    return [r for r in reports if r["spill_stores"] or r["spill_loads"]]


def _readable(mangled: str) -> str:
    """A kernel's name with its template arguments; as it is where nothing here can demangle it."""
    try:
        demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    except (OSError, AttributeError):
        return mangled
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    address = demangle(mangled.encode(), None, None, ctypes.byref(status))
    if not address:
        return mangled
    text = ctypes.string_at(address).decode()
    text = text.removeprefix("void ").replace("(anonymous namespace)::", "").replace("emr::cuda::", "")
    depth = 0
    for position, character in enumerate(text):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return text[:position].replace("emr::", "")
    return text
