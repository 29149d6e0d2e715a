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

from emr_kernels import _build

BACKENDS = ("reference", "cpu", "triton", "cuda")
_LOCK_TIMEOUT = 600.0

#: The backend that EMR_BACKEND forces, None for the best one available.
forced: str | None = os.environ.get("EMR_BACKEND") or None
if forced is not None and forced not in BACKENDS:
    raise ValueError(f"EMR_BACKEND is {forced!r}; expected one of {', '.join(BACKENDS)}, or unset")

#: Whether the compiled operators may still be built on first use.
pending = False
#: The loaded library, None without one.
library: Path | None = None
#: Why there is no library; None with one.
reason: str | None = None
#: Why there are no CUDA kernels; None with them.
cuda_reason: str | None = "not built"


def package_version() -> str:
    """Version of the installed distribution, "0+unknown" in a bare checkout."""
    try:
        return metadata.version("emr-kernels")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def _load(path: Path) -> None:
    global library, reason
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        reason = f"{path} does not load beside torch {torch.__version__}: {error}"
    else:
        library, reason = path, None


def _cache_folder(tools: _build.Toolchain) -> Path:
    root = os.environ.get("EMR_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "emr_kernels"
    digest = hashlib.sha256(repr((tools, sys.implementation.cache_tag, package_version())).encode())
    sources = _build.source_folder()
    for file in sorted(f for f in sources.rglob("*") if f.is_file()):
        digest.update(str(file.relative_to(sources)).encode() + file.read_bytes())
    digest.update(Path(_build.__file__).read_bytes())
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
        RuntimeError: if EMR_BACKEND forces the CPU kernels and they cannot be had.
    """
    global pending, reason
    pending = False
    try:
        tools = _build.find_toolchain((Path(torch.__file__).parent, torch.__version__))
        folder = _cache_folder(tools)
        path = folder / _build.OPS_LIBRARY
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if not (folder / "complete").exists():
                print(f"emr_kernels: compiling the CPU kernels into {folder} (once)", file=sys.stderr, flush=True)
                _build.build(tools, folder / "objects", folder, package_version())
                (folder / "complete").touch()
        _load(path)
    except (_build.BuildError, OSError) as error:
        reason = f"not built on first use: {error}"
        print(f"emr_kernels: {reason}; the plain PyTorch operators serve", file=sys.stderr, flush=True)
    require_forced()


def prepare() -> None:
    """Have the CPU kernels ready before an operator is called on the CPU."""
    if library is None:
        if pending:
            build_on_first_use()
        else:
            require_forced()


def require_forced() -> None:
    """Raise if EMR_BACKEND forces the CPU kernels and they cannot be had."""
    if forced == "cpu" and library is None and not pending:
        raise RuntimeError(f"EMR_BACKEND is 'cpu', but the compiled operators are missing: {reason}")


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
    global pending, reason
    ahead = Path(__file__).resolve().parent / _build.OPS_LIBRARY
    if forced == "reference":
        reason = "EMR_BACKEND is 'reference'"
    elif ahead.exists():
        _load(ahead)
    elif os.environ.get("EMR_BUILD") == "0":
        reason = "not built ahead, and EMR_BUILD is 0"
    else:
        pending = True
        reason = "not built ahead; the first call of an operator on the CPU builds it"


_start()
