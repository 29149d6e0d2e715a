"""Which backend an operator's call reaches: forced Triton kernels, eagerly and through torch.compile."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton cannot be imported")

INTERPRETED = """
import torch
from emr_kernels import info, ops
from emr_kernels.triton import common

launched = []
launch = common.launch
common.launch = lambda kernel, *args, **options: (launched.append(kernel.__name__), launch(kernel, *args, **options))

def function(a, scale, target):
    y, bits = ops.affine_relu(a, scale)
    return y, ops.affine_relu_vjp(y, bits, scale, out=target)

a, scale = torch.randn(2, 3, 5, 7), torch.randn(3)
torch.set_grad_enabled(False)
expected = torch.relu(a * scale.view(1, -1, 1, 1))
for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
    y, out = call(a, scale, torch.empty_like(a))
    assert torch.equal(y, expected) and torch.equal(out, y * scale.view(1, -1, 1, 1))
    assert launched == ["affine_relu_kernel", "affine_relu_vjp_kernel"], launched
    launched.clear()
    # Double precision is for the references.
    y, _ = call(a.double(), scale.double(), torch.empty_like(a, dtype=torch.float64))
    torch.testing.assert_close(y, torch.relu(a.double() * scale.double().view(1, -1, 1, 1)), rtol=1e-15, atol=0)
    assert not launched
serving = {entry.operator: entry for entry in info().operators}["affine_relu"]
assert (serving.backend, serving.why) == ("triton", "forced by EMR_BACKEND"), serving
"""


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_triton_in_its_interpreter() -> None:
    result = run(INTERPRETED, EMR_BACKEND="triton", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


def test_triton_refuses_the_cpu() -> None:
    from emr_kernels.triton import common, launchers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "interpreted", lambda: False)
        with pytest.raises(ValueError, match="a tensor is on the CPU; expected one on a GPU, or TRITON_INTERPRET=1"):
            launchers["pack_bits"](torch.zeros(3, dtype=torch.bool))
