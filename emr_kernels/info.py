"""What is installed here, how it was built, and which backend serves which operator."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from emr_kernels import _build, _extension, _occupancy
from emr_kernels.ops import _dispatch


@dataclass(frozen=True)
class OperatorInfo:
    """Which backend serves one operator on one type of device, and why."""

    operator: str
    device: str
    backend: str
    why: str


@dataclass(frozen=True)
class KernelInfo:
    """What one CUDA kernel takes on one architecture.

    Attributes:
        kernel: its name with template arguments.
        architecture: compute capability, "9.0".
        threads: of a block, at most; None where the source does not tell.
        registers: of a thread.
        shared: bytes of static shared memory of a block.
        spilled: bytes of registers that a thread keeps in memory.
        occupancy: theoretical, of blocks of so many threads, between 0 and 1; None where it is unknown.
    """

    kernel: str
    architecture: str
    threads: int | None
    registers: int
    shared: int
    spilled: int
    occupancy: float | None


@dataclass(frozen=True)
class Info:
    """The state of this installation; `str()` prints it as a table.

    Attributes:
        version: of this package.
        python, torch, platform: of the environment.
        devices: the devices torch sees, each with its name.
        threads: threads of CPU operators.
        forced_backend: what EMR_BACKEND says, None for the best available.
        library: path of the compiled operators, None without them.
        reason: why there are none, None with them.
        build: facts of the build: version, torch, compiler, instruction_sets compiled in, the instruction_set
            this processor gets, cuda_architectures. Empty without compiled operators.
        cuda_library: path of the CUDA kernels that are loaded, None without them.
        cuda_reason: why there are none, None with them.
        kernels: one entry for each CUDA kernel that was built, loaded or not, and architecture.
        operators: one entry for each operator and type of device.
    """

    version: str
    python: str
    torch: str
    platform: str
    devices: tuple[str, ...]
    threads: int
    forced_backend: str | None
    library: str | None
    reason: str | None
    build: Mapping[str, Any]
    cuda_library: str | None
    cuda_reason: str | None
    kernels: tuple[KernelInfo, ...]
    operators: tuple[OperatorInfo, ...]

    def __str__(self) -> str:
        build = self.build
        rows = [
            ("emr_kernels", self.version),
            ("python", self.python),
            ("torch", self.torch),
            ("platform", self.platform),
            *(("device", device) for device in self.devices),
            ("threads", str(self.threads)),
            ("EMR_BACKEND", self.forced_backend or "unset (the best available)"),
            ("library", self.library or f"none: {self.reason}"),
            ("CUDA kernels", self.cuda_library or f"none: {self.cuda_reason}"),
        ]
        if build:
            sets = ", ".join(build["instruction_sets"])
            rows += [
                ("built by", f"{build['compiler']} for torch {build['torch']}"),
                ("instructions", f"{build['instruction_set']} (of {sets})"),
                ("CUDA built for", ", ".join(build["cuda_architectures"]) or "nothing"),
            ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        name_width = max(len(entry.operator) for entry in self.operators)
        lines += ["", f"{'operator':<{name_width}}  {'device':<6}  {'backend':<9}  why"]
        lines += [
            f"{entry.operator:<{name_width}}  {entry.device:<6}  {entry.backend:<9}  {entry.why}"
            for entry in self.operators
        ]
        return "\n".join([*lines, *self._kernel_lines()])

    def _kernel_lines(self) -> list[str]:
        if not self.kernels:
            return []
        architectures = list(dict.fromkeys(entry.architecture for entry in self.kernels))
        rows = {"": {name: name for name in architectures}}
        for entry in self.kernels:
            share = "?" if entry.occupancy is None else f"{entry.occupancy:.0%}"
            spilled = f" +{entry.spilled}" if entry.spilled else ""
            cell = f"{entry.registers}{spilled} {entry.shared} {share}"
            rows.setdefault(f"{entry.kernel} {entry.threads or '?'}", {})[entry.architecture] = cell
        widths = {name: max(len(row.get(name, "")) for row in rows.values()) for name in architectures}
        first = max(map(len, rows))
        lines = [
            "  ".join([f"{kernel:<{first}}", *(f"{row.get(name, ''):>{widths[name]}}" for name in architectures)])
            for kernel, row in rows.items()
        ]
        title = (
            "CUDA kernels and threads of a block; for each architecture: registers (+ bytes spilled), "
            "bytes of shared memory, theoretical occupancy"
        )
        return ["", title, *lines]


def _devices() -> tuple[str, ...]:
    cpu = f"cpu: {platform.processor() or platform.machine()}"
    if not torch.cuda.is_available():
        return (cpu,)
    return (cpu, *(f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())))


def _kernels() -> tuple[KernelInfo, ...]:
    report = {} if _extension.library is None else _build.read_report(_extension.library.parent)
    entries = []
    for kernel in report.get("kernels", ()):
        needs = kernel["architecture"], kernel["registers"], kernel["shared"], kernel["threads"]
        entries.append(
            KernelInfo(
                kernel["kernel"],
                kernel["architecture"],
                kernel["threads"],
                kernel["registers"],
                kernel["shared"],
                kernel["spill_stores"],
                None if kernel["threads"] is None else _occupancy.occupancy(*needs),
            )
        )
    return tuple(entries)


def info() -> Info:
    """Versions, build, devices, and which backend serves which operator and why. Builds nothing."""
    _extension.load_built()
    facts = _extension.facts_module()
    types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return Info(
        version=_extension.package_version(),
        python=platform.python_version(),
        torch=torch.__version__,
        platform=platform.platform(),
        devices=_devices(),
        threads=torch.get_num_threads(),
        forced_backend=_extension.forced,
        library=None if _extension.library is None else str(_extension.library),
        reason=_extension.reason,
        build={} if facts is None else facts.facts(),
        cuda_library=None if _extension.cuda_library is None else str(_extension.cuda_library),
        cuda_reason=_extension.cuda_reason,
        kernels=_kernels(),
        operators=tuple(
            OperatorInfo(operator.name, device, *operator.serving(device))
            for operator in _dispatch.operators.values()
            for device in types
        ),
    )
