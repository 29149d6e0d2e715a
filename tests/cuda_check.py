"""Compiles and links the CUDA kernels for every architecture, GPU or not, and fails if one of them spills registers.

    python tests/cuda_check.py

Works beside a CPU build of torch. Objects stay in .cache/cuda, so a second run compiles only what changed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "cuda"


def compile_all() -> Mapping[str, Any]:
    """Build the CUDA kernels and the module of build facts into `FOLDER`/out, and return the report on them.

    Raises:
        BuildError: if that fails, or there is no nvcc.
    """
    from emr_kernels import _build

    before = {name: os.environ.get(name) for name in ("EMR_CUDA", "TORCH_CUDA_ARCH_LIST")}
    os.environ["EMR_CUDA"] = "1"
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
    try:
        wanted = (_build.CUDA_LIBRARY, _build.FACTS_MODULE)
        _build.build(_build.find_toolchain(), FOLDER, FOLDER / "out", "0", wanted)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    return _build.read_report(FOLDER / "out")


def main() -> int:
    from emr_kernels import _nvcc
    from emr_kernels._build import BuildError

    try:
        _nvcc.locate()
    except BuildError as error:
        print(f"cuda-check: SKIPPED, no CUDA kernel was compiled: {error}")
        return 0
    report = compile_all()
    kernels, spills = report["kernels"], _nvcc.spilling(report["kernels"])
    print(f"cuda-check: {len(kernels)} kernels by nvcc {report['nvcc']} for {' '.join(report['architectures'])}")
    for kernel in spills:
        print(f"cuda-check: FAILED, registers in memory: {kernel}")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
