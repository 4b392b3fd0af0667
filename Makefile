# Every target sets up what it needs: a virtual environment with a pinned torch, and the package built in place.
# `make test PYTHON=...` takes another interpreter, `TORCH=...` another torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu)
HOST_EXECUTION := $(wildcard tests/cuda_host/*)
# The build looks for ninja on the path.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: test demo bench paper gpu lint format clean

test: $(VENV)/built
	$(BIN)/python -m pytest -q

demo: $(VENV)/built
	$(BIN)/jackpot demo

bench: $(VENV)/built
	$(BIN)/python -m benchmarks

# The paper's experiments on CIFAR-10 at the reduced scale: JACKPOT_DATA names the folder that holds the images.
paper: $(VENV)/built
	$(BIN)/python -m benchmarks.paper all --jobs 2

# What needs a GPU, in the environment at hand, whose torch has CUDA; nothing is fetched. PYTEST_ADDOPTS="-n 8"
# lets pytest-xdist, where it is installed, compile the kernels on several processors.
gpu:
	$(PYTHON) -m pip install --quiet --no-index --no-build-isolation --no-deps --editable .
	$(PYTHON) -m pytest -q -m gpu
	$(PYTHON) -m benchmarks.bench_cuda_search_step
	$(PYTHON) -m benchmarks.bench_cuda_training_step
	$(PYTHON) -m benchmarks.bench_masked_layers --compile-jobs "$$(nproc)"

lint: $(VENV)/built
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(HOST_EXECUTION)

format: $(VENV)/built
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(SOURCES) $(HOST_EXECUTION)

clean:
	rm -rf $(VENV) build *.egg-info jackpot_kernels/*.so

# torch comes first and alone, so that nothing below resolves another one.
$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("jackpot_kernels needs Python >= 3.10" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" ninja numpy
	touch $@

$(VENV)/built: $(VENV)/ready setup.py jackpot_kernels/_extension.py $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[cli,test]"
	touch $@
