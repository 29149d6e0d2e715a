"""Loads the compiled operators; builds them on first use where nothing was built ahead.

Nothing here makes an import fail for want of the extension: without it the references serve, and `reason` says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

from emr_kernels import _build, _nvcc

BACKENDS = ("reference", "cpu", "triton", "cuda")
_LOCK_TIMEOUT = 1800.0

#: The backend that EMR_BACKEND forces, None for the best one available.
forced: str | None = os.environ.get("EMR_BACKEND") or None
if forced is not None and forced not in BACKENDS:
    raise ValueError(f"EMR_BACKEND is {forced!r}; expected one of {', '.join(BACKENDS)}, or unset")

#: Whether Triton's interpreter serves CPU tensors; without it a forced Triton is for GPUs only.
interpreted = forced == "triton" and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")

#: Whether the compiled operators may still be built on first use.
pending = False
#: The loaded library, None without one.
library: Path | None = None
#: Why there is no library; None with one.
reason: str | None = None
#: The loaded library of CUDA kernels, None without one.
cuda_library: Path | None = None
#: Why there are no CUDA kernels; None with them.
cuda_reason: str | None = None


def package_version() -> str:
    """Version of the installed distribution, "0+unknown" in a bare checkout."""
    try:
        return metadata.version("emr-kernels")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def _load(path: Path) -> None:
    global library, reason, cuda_reason
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        reason = cuda_reason = f"{path} does not load beside torch {torch.__version__}: {error}"
    else:
        library, reason = path, None
        _load_cuda(path.with_name(_build.CUDA_LIBRARY))


def _load_cuda(path: Path) -> None:
    """Load the CUDA kernels where torch has CUDA: elsewhere their library lacks what it is linked against."""
    global cuda_library, cuda_reason
    if torch.version.cuda is None:
        cuda_reason = f"torch {torch.__version__} is a build without CUDA"
    elif not path.exists():
        cuda_reason = f"not built: {_build.read_report(path.parent).get('reason') or 'no report of the build'}"
    else:
        try:
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError) as error:
            cuda_reason = f"{path} does not load beside torch {torch.__version__}: {error}"
        else:
            cuda_library, cuda_reason = path, None


def _toolchain() -> _build.Toolchain:
    """For the torch that is imported."""
    return _build.find_toolchain((Path(torch.__file__).parent, torch.__version__))


def _cache_folder(tools: _build.Toolchain) -> Path:
    root = os.environ.get("EMR_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "emr_kernels"
    digest = hashlib.sha256(repr((tools, sys.implementation.cache_tag, package_version())).encode())
    sources = _build.source_folder()
    for file in sorted(f for f in sources.rglob("*") if f.is_file()):
        digest.update(str(file.relative_to(sources)).encode() + file.read_bytes())
    for module in (_build.__file__, _nvcc.__file__):
        digest.update(Path(str(module)).read_bytes())
    return Path(root).expanduser() / digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    import fcntl

    with file.open("w") as handle:
        deadline = time.monotonic() + _LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise _build.BuildError(f"another process holds {file} for {_LOCK_TIMEOUT:.0f} s") from None
                time.sleep(0.1)
        yield


def build_on_first_use() -> None:
    """Build the extension into the user's cache folder, or take it from there, and load it.

    Raises:
        RuntimeError: if EMR_BACKEND forces the CPU kernels, or EMR_CUDA the CUDA kernels, and nothing can be built.
    """
    global pending, reason, cuda_reason
    pending = False
    try:
        tools = _toolchain()
        folder = _cache_folder(tools)
        path = folder / _build.OPS_LIBRARY
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if not (folder / "complete").exists():
                what = "CPU kernels" if tools.nvcc is None else "CPU and CUDA kernels"
                print(f"emr_kernels: compiling the {what} into {folder} (once)", file=sys.stderr, flush=True)
                done = _build.build(tools, folder / "objects", folder, package_version())
                if tools.nvcc is not None and done.nvcc is None:
                    print(f"emr_kernels: no CUDA kernels: {done.no_cuda}", file=sys.stderr, flush=True)
                (folder / "complete").touch()
        _load(path)
    except (_build.BuildError, OSError) as error:
        reason = cuda_reason = f"not built on first use: {error}"
        others = "Triton serves on a GPU, plain PyTorch elsewhere" if torch.version.cuda else "plain PyTorch serves"
        print(f"emr_kernels: {reason}; {others}", file=sys.stderr, flush=True)
    require_forced()


def load_built() -> None:
    """Load what an earlier first use built, if anything; builds nothing. Without tools to build `reason` says so."""
    global pending, reason, cuda_reason
    if not pending:
        return
    try:
        folder = _cache_folder(_toolchain())
    except _build.BuildError as error:
        reason = cuda_reason = f"not built ahead, and cannot be on first use: {error}"
        return
    if (folder / "complete").exists():
        pending = False
        _load(folder / _build.OPS_LIBRARY)


def prepare() -> None:
    """Have the compiled kernels ready before an operator is called."""
    if library is None:
        if pending:
            build_on_first_use()
        else:
            require_forced()


def require_forced() -> None:
    """Raise if the environment demands kernels that cannot be had."""
    if pending:
        return
    if forced == "cpu" and library is None:
        raise RuntimeError(f"EMR_BACKEND is 'cpu', but the compiled operators are missing: {reason}")
    if os.environ.get("EMR_CUDA") == "1" and library is None and forced != "reference":
        raise RuntimeError(f"EMR_CUDA is 1, but the compiled operators are missing: {reason}")


def facts_module() -> ModuleType | None:
    """The module of build facts that was built with the loaded library; None if it is missing."""
    if library is None:
        return None
    path = library.with_name(_build.FACTS_MODULE)
    spec = importlib.util.spec_from_file_location("emr_kernels._C", path)
    if spec is None or spec.loader is None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError):
        return None
    return module


def _start() -> None:
    global pending, reason, cuda_reason
    ahead = Path(__file__).resolve().parent / _build.OPS_LIBRARY
    if forced == "reference":
        reason = cuda_reason = "EMR_BACKEND is 'reference'"
    elif interpreted:
        reason = cuda_reason = "EMR_BACKEND is 'triton', in Triton's interpreter"
    elif ahead.exists():
        _load(ahead)
    elif os.environ.get("EMR_BUILD") == "0":
        reason = cuda_reason = "not built ahead, and EMR_BUILD is 0"
    else:
        pending = True
        reason = cuda_reason = "not built ahead; the first call of an operator builds it"


_start()
