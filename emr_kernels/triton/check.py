"""Compile every Triton kernel for GPUs that need not be there: `python -m emr_kernels.triton.check`.

Each file of kernels has a function `examples()`, which calls the file's launchers on meta tensors. The launches are
recorded, specialised as Triton would specialise them, and compiled to machine code for sm_80, sm_90 and sm_100 with
the assembler inside Triton. The check prints what each kernel needs, and fails if one does not compile, spills
registers, needs more shared memory than an SM has, or is in no example. Kernels are the `@triton.jit` functions whose
names end in `_kernel`. Of an autotuned kernel every configuration that pruning leaves is compiled: keep them few.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import pkgutil
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from emr_kernels.triton import common

#: Shared memory that one block may have, in bytes, by compute capability.
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Specialisation:
    """One kernel with the types and constants that Triton compiles it for, in the form of Triton's compiler."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def __str__(self) -> str:
        pointers = sorted({kind for kind in self.signature.values() if kind.startswith("*")})
        wide = ["64-bit"] if "i64" in self.signature.values() else []
        unaligned = ["unaligned"] if {n for n, k in self.signature.items() if k[0] == "*"} - {*self.aligned} else []
        constants = [f"{name}={value}" for name, value in self.constants.items() if name.isupper()]
        return " ".join([self.name, *pointers, *wide, *unaligned, *constants, f"warps={self.options['num_warps']}"])

    def compile(self, capability: int) -> Any:
        """The compiled kernel for a compute capability, as Triton returns it."""
        arguments = self.kernel.arg_names
        attributes = {(arguments.index(name),): [["tt.divisibility", 16]] for name in self.aligned}
        source = ASTSource(self.kernel, self.signature, self.constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)

    def resources(self, capability: int) -> str:
        """Registers and shared memory, by compiling with an empty cache and TRITON_DUMP_PTXAS_LOG=1.

        Raises:
            RuntimeError: if it spills, or needs more shared memory than there is.
            Exception: whatever Triton raises if it does not compile.
        """
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            shared = self.compile(capability).metadata.shared
        registers = re.search(r"Used (\d+) registers", log.getvalue())
        spills = re.findall(r"(\d+) bytes spill", log.getvalue())
        if registers is None or not spills:
            raise RuntimeError(f"the assembler told no registers: {log.getvalue()!r}")
        if any(int(spill) for spill in spills):
            raise RuntimeError(f"spills {' + '.join(spills)} bytes of registers")
        if shared > SHARED_MEMORY[capability]:
            raise RuntimeError(f"needs {shared} bytes of shared memory of {SHARED_MEMORY[capability]}")
        return f"{registers[1]} registers, {shared} bytes shared"


def _specialise(kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Specialisation:
    """Types and constants of a launch, by the rules of Triton's own launcher."""
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    options = {"num_warps": 4}
    for name, value in keywords.items():
        (values if name in kernel.arg_names else options)[name] = value
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for parameter in kernel.params:
        name = parameter.name
        value = values.get(name, parameter.default)
        number = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (number and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            address = value.storage_offset() * value.element_size()
        elif number:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            address = value
        elif isinstance(value, (bool, float)):
            signature[name] = "i1" if isinstance(value, bool) else "fp32"
            continue
        else:
            raise TypeError(f"{name} of {kernel.__name__} is {value!r}; expected a tensor, a number or None")
        unspecialised = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if address % 16 == 0 and not unspecialised:
            aligned.append(name)
    return Specialisation(kernel, signature, constants, tuple(aligned), options)


def _specialisations(launch: common.Launch) -> Iterator[Specialisation]:
    kernel = launch.kernel
    if not isinstance(kernel, Autotuner):
        yield _specialise(kernel, launch.arguments, launch.keywords)
        return
    named = dict(zip(kernel.arg_names, launch.arguments, strict=False))
    prune = kernel.early_config_prune
    for config in prune(kernel.configs, named, **launch.keywords) if prune else kernel.configs:
        chosen = {"num_warps": config.num_warps, "num_stages": config.num_stages, **config.kwargs}
        yield _specialise(kernel.fn, launch.arguments, {**launch.keywords, **chosen})


def _kernels(module: ModuleType) -> Iterator[Any]:
    for name, value in vars(module).items():
        kernel = value.fn if isinstance(value, Autotuner) else value
        if name.endswith("_kernel") and isinstance(kernel, JITFunction) and kernel.fn.__module__ == module.__name__:
            yield kernel


@functools.cache
def specialisations(module_name: str) -> tuple[Specialisation, ...]:
    """What a module's examples launch, each specialisation once.

    Raises:
        RuntimeError: if one of the module's kernels is in no example.
    """
    module = importlib.import_module(module_name)
    with common.recording() as launches:
        if hasattr(module, "examples"):
            module.examples()
    found = {str((s, s.signature, s.aligned, s.options)): s for launch in launches for s in _specialisations(launch)}
    for kernel in _kernels(module):
        if all(s.kernel is not kernel for s in found.values()):
            raise RuntimeError(f"{kernel.__name__} is in no example of {module_name}; expected a launch in examples()")
    return tuple(found.values())


def _check(task: tuple[str, int, Sequence[int]]) -> tuple[str, list[str]]:
    """A line about one specialisation, and what failed."""
    module_name, index, capabilities = task
    specialisation = specialisations(module_name)[index]
    results, failures = [], []
    for capability in capabilities:
        try:
            results.append(f"sm_{capability} {specialisation.resources(capability)}")
        except Exception as error:
            results.append(f"sm_{capability} FAILED")
            failures.append(f"{specialisation}: sm_{capability} FAILED: {_told(error)}")
    return f"{specialisation}: {'; '.join(results)}", failures


def _told(error: BaseException) -> str:
    """What an error says, and what the errors that it came from say: Triton wraps one for each function it is in."""
    inner = error.__cause__
    return f"{type(error).__name__}: {error}" + ("" if inner is None else f"\n  from {_told(inner)}")


def _modules() -> list[str]:
    package = importlib.import_module("emr_kernels.triton")
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return [f"{package.__name__}.{name}" for name in names if name not in ("check", "common")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the kernels of the modules named on the command line, of the whole package by default."""
    parser = argparse.ArgumentParser(prog="python -m emr_kernels.triton.check", description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="importable modules of kernels (default: all of emr_kernels.triton)")
    parser.add_argument("--capability", type=int, action="append", choices=sorted(SHARED_MEMORY))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    options = parser.parse_args(arguments)
    if common.interpreted():
        parser.error("TRITON_INTERPRET is set, and interpreted kernels do not compile; expected it unset")

    capabilities = tuple(options.capability or SHARED_MEMORY)
    failures: list[str] = []
    tasks: list[tuple[str, int, Sequence[int]]] = []
    for module_name in options.modules or _modules():
        try:
            count = len(specialisations(module_name))
        except Exception as error:
            failures.append(f"{module_name}: FAILED: {_told(error)}")
            continue
        tasks += [(module_name, index, capabilities) for index in range(count)]
    with tempfile.TemporaryDirectory() as cache, contextlib.ExitStack() as stack:
        # Only what is compiled anew tells its registers.
        os.environ.update(TRITON_CACHE_DIR=cache, TRITON_DUMP_PTXAS_LOG="1")
        if options.jobs > 1 and len(tasks) > 1:
            # A process of its own for each job: a fork would share the compiler's threads and locks.
            pool = multiprocessing.get_context("spawn").Pool(min(options.jobs, len(tasks)))
            results: Iterator[tuple[str, list[str]]] = stack.enter_context(pool).imap(_check, tasks)
        else:
            results = map(_check, tasks)
        for line, failed in results:
            failures += failed
            print(line, flush=True)
    if failures:
        print("\n".join([f"{len(failures)} failed:", *failures]))
        return 1
    print(f"{len(tasks)} specialisations compiled for {len(capabilities)} architectures, Triton {triton.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
