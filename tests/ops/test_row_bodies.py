"""The bodies of the CUDA kernels over rows, run on the CPU by teams of threads: indices, tails, ranks, sums, labels."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest
import test_logit_seeds
import test_robust_losses
import torch
from torch import Tensor

from emr_kernels import _build

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows of 1, 2, 8 and 32 lanes with few elements each, of 16 and 32 lanes with many, and of a block; with and without
# vectors of 16 bytes.
SHAPES = [(5, 3), (4, 10), (3, 64), (2, 250), (2, 300), (2, 1000), (2, 2053), (2, 2064)]


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The compiled bodies; skips without a compiler."""
    try:
        tools = _build.find_toolchain()
    except _build.BuildError as error:
        pytest.skip(str(error))
    source = Path(__file__).with_name("rows_on_cpu.cpp")
    library = tmp_path_factory.mktemp("bodies") / "rows.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    includes = ["-I", str(_build.source_folder()), "-isystem", str(tools.torch / "include")]
    subprocess.run([tools.compiler, *flags, *includes, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def run_seeds(
    bodies: ctypes.CDLL, z: Tensor, y: Tensor | None, t: Tensor | None, kind: str, temperature: float, center: bool
) -> list[Tensor]:
    seed = torch.full_like(z, torch.nan)
    each = [torch.full((len(z),), torch.nan) for _ in range(3)]
    runner_up = torch.full((len(z),), -7)
    bodies.logit_seeds(
        DTYPES.index(z.dtype),
        *map(pointer, (z, y, t, seed, *each, runner_up)),
        ctypes.c_int64(len(z)),
        z.shape[1],
        test_logit_seeds.reference.KINDS.index(kind),
        ctypes.c_float(temperature),
        ctypes.c_bool(center),
    )
    return [seed, each[0], each[1], runner_up, each[2]]


def run_losses(
    bodies: ctypes.CDLL, a: Tensor, c: Tensor | None, y: Tensor | None, w: Tensor | None, kind: str, *numbers: Any
) -> list[Tensor]:
    beta, smoothing, mail, slope, bias = numbers
    loss = torch.full((len(a),), torch.nan)
    grad = torch.full(a.shape, torch.nan)
    clean_grad = torch.empty(0) if c is None else torch.full(a.shape, torch.nan)
    bodies.robust_losses(
        DTYPES.index(a.dtype),
        *map(pointer, (a, c, y, w, loss, grad, clean_grad)),
        ctypes.c_int64(len(a)),
        a.shape[1],
        test_robust_losses.reference.KINDS.index(kind),
        ctypes.c_double(beta),
        ctypes.c_double(smoothing),
        ctypes.c_bool(mail),
        ctypes.c_double(slope),
        ctypes.c_double(bias),
    )
    return [loss, grad, clean_grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_seeds(bodies: ctypes.CDLL, shape: tuple[int, int], dtype: torch.dtype) -> None:
    z = (torch.randn(shape) * 8).to(dtype)
    y, t = test_logit_seeds.labels(*shape)
    for kind in test_logit_seeds.kinds(shape[1]):
        target = t if kind in test_logit_seeds.reference.TARGETED else None
        label, center = (None, True) if kind == "softmax" else (y, False)
        found = run_seeds(bodies, z, label, target, kind, 3.0, center)
        test_logit_seeds.compare(found, test_logit_seeds.exact(z, label, target, kind, 3.0, center), z, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses(bodies: ctypes.CDLL, shape: tuple[int, int], dtype: torch.dtype) -> None:
    a, c, y, w = test_robust_losses.example(*shape, dtype, 5.0)
    for kind, beta, smoothing, mail in test_robust_losses.CASES[1::2]:
        slope, bias = mail
        tensors = (a, None if kind == "ce" else c, y, w)
        options = (kind, beta, smoothing, True, slope, bias)
        test_robust_losses.compare(run_losses(bodies, *tensors, *options), (*tensors, *options))


def test_special_values(bodies: ctypes.CDLL) -> None:
    z = test_logit_seeds.SPECIAL
    for kind in test_logit_seeds.reference.KINDS:
        target = torch.full((len(z),), 2) if kind in test_logit_seeds.reference.TARGETED else None
        found = run_seeds(bodies, z, None, target, kind, 1.0, False)
        test_logit_seeds.compare(found, test_logit_seeds.exact(z, None, target, kind, 1.0, False), z, kind)
    a, c = test_robust_losses.ROWS, test_robust_losses.ROWS.roll(1, 0)
    y = torch.zeros(len(a), dtype=torch.int64)
    for kind in test_robust_losses.reference.KINDS:
        options = (kind, 2.0, 0.0, False, 0.0, 0.0)
        found = run_losses(bodies, a, None if kind == "ce" else c, y, None, *options)
        for n in range(len(a)):
            one = (a[n : n + 1], None if kind == "ce" else c[n : n + 1], y[:1], None)
            test_robust_losses.compare([t[n : n + 1] for t in found], (*one, *options))


def test_labels_out_of_range(bodies: ctypes.CDLL) -> None:
    test_logit_seeds.check_labels_out_of_range(lambda *arguments: run_seeds(bodies, *arguments))
    test_robust_losses.check_labels_out_of_range(lambda *arguments: run_losses(bodies, *arguments))
