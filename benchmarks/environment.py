"""Where a figure comes from: machine, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from emr_kernels import _build, _nvcc

ROOT = Path(__file__).resolve().parent.parent
#: Has glibc take all memory from its heap and never return any, so that an allocation is warm after the first one.
WARM_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**46), "MALLOC_TOP_PAD_": str(2**26)}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """The commit of the checkout, with "+changes" where files differ from it; "unknown" outside of one."""
    found = _output("git", "rev-parse", "--short=12", "HEAD")
    if found is None:
        return os.environ.get("EMR_COMMIT", "unknown")
    return found + ("+changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _nvcc_version() -> str | None:
    try:
        told = _output(_nvcc.locate(), "--version")
    except _build.BuildError:
        return None
    match = re.search(r"V(\d[\d.]+)", told or "")
    return match.group(1) if match else None


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def describe(device: torch.device) -> dict[str, Any]:
    """The environment of a measurement on a device."""
    found = {
        "device": _processor(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "nvcc": _nvcc_version(),
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": properties.L2_cache_size,
        }
    return found
