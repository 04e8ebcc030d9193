# Everything runs in .venv, which `make setup` fills from pyproject.toml at the versions of constraints.txt.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
READY := .venv/.ready
# Every pytest worker computes with one thread: two of them with two each would only wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10 -n $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint train train-recurrent bench gpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 24

setup: $(READY)  ## create .venv and install attncc and its tools there

demo: $(READY)  ## compile an example, verify it, and time it beside PyTorch
	@$(BIN)/python examples/demo.py

test: $(READY)  ## the quick tier of tests
	$(PYTEST)

test-all: $(READY)  ## the long tier: every example, backend and type, many random specifications, the wheel
	$(PYTEST) -m "not gpu"

lint: $(READY)  ## format, style, types, layers, dead code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/vulture

train: $(READY)  ## train a small language model, and the same by plain PyTorch; writes docs/train_lm.png
	$(BIN)/python examples/train_lm.py --check --out docs/train_lm.png

train-recurrent: $(READY)  ## likewise a recurrent one, which then writes; writes docs/recurrent_lm.png
	$(BIN)/python examples/recurrent_lm.py --check --out docs/recurrent_lm.png

bench: $(READY)  ## the benchmark grid on this machine; writes benchmarks/results/
	$(BIN)/python benchmarks/forward.py
	$(BIN)/python benchmarks/backward.py
	$(BIN)/python benchmarks/long.py
	$(BIN)/python benchmarks/recurrent.py
	$(BIN)/python benchmarks/latency.py

gpu: $(READY)  ## on a machine with a GPU: its tests and benchmark grid; writes benchmarks/results/
	$(BIN)/python benchmarks/gpu.py

clean:  ## remove .venv and what tools left behind
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "attncc needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
