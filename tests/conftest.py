"""Every test starts from the same random state and leaves the process as it found it."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# The oracle and the zoo are plain modules beside this file, importable under every import mode of pytest.
if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

# Triton decides when a kernel is defined whether it will be interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Convolutions in TF32 keep three digits; the tests compare with more.
torch.backends.cudnn.allow_tf32 = False

# The models are tiny: on a shared machine a second thread costs far more in waiting than it gives.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Seed torch and Python; restore generators, default dtype, grad mode and determinism afterwards."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    default_dtype = torch.get_default_dtype()
    grad_enabled = torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    random.seed(0)
    yield
    torch.set_rng_state(torch_state)
    random.setstate(python_state)
    torch.set_default_dtype(default_dtype)
    torch.set_grad_enabled(grad_enabled)
    torch.use_deterministic_algorithms(deterministic)
