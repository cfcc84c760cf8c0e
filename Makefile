# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Each installs what it needs into .venv first; nothing outside this folder is touched.

PYTHON ?= python3.11
VENV ?= .venv
ATTENTION ?= dattn
OUTPUT ?= runs/demo-$(ATTENTION)
PYTEST_ARGS ?=
# More words for pip when it installs torch, such as an index with builds for machines without GPU.
TORCH_ARGS ?=

RUN := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all lint install clean help

help:
	@echo "make demo                    train and evaluate a small model here (about 15 minutes)"
	@echo "make demo ATTENTION=s_attn   the same with conventional causal attention"
	@echo "make test                    the test suite (about 10 minutes on two cores)"
	@echo "make lint                    ruff and mypy"

# torch first: a range in another package would otherwise pull a build for another machine.
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH_ARGS) "$$(grep '^torch==' requirements.lock)"
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

install: $(VENV)/.installed

demo: install
	$(RUN) examples/quickstart/demo.py --attention $(ATTENTION) --output $(OUTPUT)

test: install
	$(RUN) -m pytest -n 2 --dist worksteal -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: install
	$(RUN) -m pytest -n 2 --dist worksteal -m "not gpu" $(PYTEST_ARGS)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
