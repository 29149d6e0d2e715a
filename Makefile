# make demo and make test need Python 3.10 or later; with a C++ compiler the CPU kernels are built too.
PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) emr_kernels/_build.py emr_kernels/_nvcc.py
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
.PHONY: demo test test-independent lint format typecheck triton-check cuda-check gpu-check bench bench-micro \
	bench-check clean

# The demo's nets are so small that a second thread costs more than it gives.
demo: export OMP_NUM_THREADS ?= 1
demo: $(VENV)/installed
	$(BIN)/emr demo

# One process for each core; more threads in each would only get in each other's way.
test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

# The attacks against independent implementations, which pip 25.1 and later finds in pyproject.toml.
test-independent: $(VENV)/installed
	$(BIN)/python -m pip install --quiet "pip>=25.1"
	$(BIN)/python -m pip install --quiet --no-deps --group attacks-reference
	$(BIN)/python -m pytest tests/training/test_independent.py tests/training/test_independent_ensemble.py

# Needs nvcc, but neither a GPU nor a CUDA build of torch; says so where it skips.
cuda-check: $(VENV)/installed
	$(BIN)/python tests/cuda_check.py

# For a machine with a GPU, with the python that has a CUDA build of torch; needs no network and no .venv.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/installed
	$(BIN)/mypy

# Every Triton kernel compiled for sm_80, sm_90 and sm_100; needs no GPU.
triton-check: $(VENV)/installed
	env -u TRITON_INTERPRET $(BIN)/python -m emr_kernels.triton.check

# Every operator against eager PyTorch and torch.compile, on the GPU if there is one; takes minutes.
bench-micro: $(VENV)/installed
	$(BIN)/python -m benchmarks.micro --rounds .benchmarks/micro-rounds.json

# What the library buys on this machine, against what one would use without it; takes minutes.
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.throughput

# The operators against their stored rows of this device; names what is over 10% slower.
bench-check: $(VENV)/installed
	$(BIN)/python -m benchmarks.micro.check

$(VENV)/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache
	rm -f emr_kernels/*.so emr_kernels/emr_cuda.json
	find emr_kernels python tests -name __pycache__ -type d -prune -exec rm -rf {} +
