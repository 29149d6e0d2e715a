"""Results as JSON, with what is needed to reproduce them."""

from __future__ import annotations

import json
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from emr_training.checkpoint import write_atomically

PACKAGES = ("emr-kernels", "torch", "lightning-fabric", "numpy", "scikit-learn", "matplotlib")


def environment() -> dict[str, Any]:
    """Versions of Python and of the packages that decide results, the platform, and the CPU threads."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["torch"] = torch.__version__  # with the build, which the package's metadata may leave out
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write `results` to `path` as JSON, whole or not at all; a list of numbers is one line.

    Raises ValueError for NaN or infinity.
    """
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    # Inside a string a line break is written as an escape: only lists have one after the bracket.
    text = re.sub(r"\[\n([^][{}\"]+)\n *\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    write_atomically(path, lambda file: file.write(text.encode()))
