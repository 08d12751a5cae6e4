# Every target does its own set-up: a virtual environment in .venv, once for each state of pyproject.toml.

PYTHON ?= python3
# This exact pin takes a CPU build where one is offered; a looser one may pull gigabytes of CUDA packages.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
DOCS_STAMP := $(VENV)/.docs-stamp

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: demo test soak lint docs help clean

demo: $(STAMP) ## the real SVD and AnimateDiff UNets on this CPU: memory, time and error, in a table and a page
	$(BIN)/fmecompile demo

test: $(STAMP) ## run the tests that take no GPU and no minutes
	$(BIN)/pytest -q -m "not slow" --numprocesses auto --dist worksteal

soak: $(STAMP) ## random graphs, plan files and calls; SOAK=1000 graphs, the rest in proportion
	SOAK=$${SOAK:-1000} $(BIN)/pytest -q -m "slow or not slow" --numprocesses auto --dist worksteal tests/soak

lint: $(STAMP) ## lint, formatting, types, import directions
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/pytest -q tests/test_layers.py

docs: $(DOCS_STAMP) ## build the documentation: docs/_build/index.html
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

clean: ## remove build outputs and caches; .venv stays
	rm -rf build dist docs/_build *.egg-info .pytest_cache .hypothesis .ruff_cache demo.html demo.json
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("fmecompile needs Python 3.11 or newer; next: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@
