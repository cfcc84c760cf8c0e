# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Each installs what it needs into .venv first; nothing outside this folder is touched. The
# interpreter is the first suitable one that tools/find_python.sh finds; PYTHON=... names another.

VENV ?= .venv
ATTENTION ?= dattn
OUTPUT ?= runs/demo-$(ATTENTION)
SEED ?= 1
SMOLLM2_OUTPUT ?= runs/smollm2_135m
SMOLLM2_ARGS ?=
PYTEST_ARGS ?=
READERS ?=

RUN := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
# Given on the command line or in the environment, for the scripts below.
export PYTHON TORCH_ARGS

.PHONY: demo demo-smollm2 test test-all test-parallel test-newest test-pythons test-readers gpu-check lint install clean help

help:
	@echo "make demo                    train and evaluate a small model here (about 15 minutes)"
	@echo "make demo ATTENTION=s_attn   the same with conventional causal attention"
	@echo "make demo-smollm2            a published language model learns to see here (half an hour once its encoder is made)"
	@echo "make test                    the test suite (about 21 minutes on two cores)"
	@echo "make test-parallel           every parallel layout against one process (about 6 minutes)"
	@echo "make test-newest             the test suite with the newest megatron-core, on Python 3.12 up"
	@echo "make test-pythons            saving, loading and resuming under every Python found"
	@echo "make test-readers            exports under several versions of transformers (about 2 minutes)"
	@echo "make gpu-check               tests, errors, times and memory on a GPU (8 minutes)"
	@echo "make lint                    ruff and mypy"

install:
	@tools/make_environment.sh "$(VENV)"

demo: install
	$(RUN) examples/quickstart/demo.py --attention $(ATTENTION) --output $(OUTPUT)

# SEED and ATTENTION name the run; weights and data come with two packages (108 MB).
demo-smollm2: install
	$(RUN) examples/smollm2_135m/demo.py --attention $(ATTENTION) --seed $(SEED) \
		--output $(SMOLLM2_OUTPUT) $(SMOLLM2_ARGS)

# Four processes, also on two cores: half of a test's time goes in waiting for ranks and launchers.
test: install
	$(RUN) -m pytest -n 4 --dist worksteal -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: install
	$(RUN) -m pytest -n 4 --dist worksteal -m "not gpu" $(PYTEST_ARGS)

# Writes the tables of docs/parallelism.md.
test-parallel: install
	$(RUN) -m tests.layouts.run --write

# megatron-core 0.19 needs Python 3.12, and has an environment of its own.
test-newest:
	@ADMITTED=">=3.12,<3.14" tools/make_environment.sh .venv-newest requirements-newest.lock
	.venv-newest/bin/python -m pytest -n 4 --dist worksteal -m "not slow and not gpu" $(PYTEST_ARGS)

test-pythons:
	tools/test_pythons.sh $(PYTEST_ARGS)

# Each version has an environment of its own below .venv-readers; READERS="5.24.0" takes some only.
test-readers: install
	$(RUN) -m tests.readers.run $(READERS)

# Installs nothing: the machine may have no network. RUN=python3 takes what is there.
gpu-check:
	$(RUN) -m benchmarks.gpu_check

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) .venv-newest .venv-pythons .venv-readers runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
