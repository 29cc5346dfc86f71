# Everything runs in .venv, which is made on first use. Needed: Python 3.11 or newer, and a package index.

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
  $(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

# Two workers of one thread each beat one of two threads: the models of the tests are too small to share out.
# A file's tests stay on one worker, so that what it trains once is trained once.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 MPLBACKEND=Agg \
  $(BIN)/python -m pytest
PARALLEL := -n $(WORKERS) --dist loadfile

.PHONY: help install demo test test-all test-browser lint format coverage mutants bench clean

help:
	@echo 'make demo          the study on the bundled model, end to end; ends with the path of the report'
	@echo 'make test          the fast tests'
	@echo 'make test-all      those and the slow ones'
	@echo 'make test-browser  the report, opened in Chromium'
	@echo 'make lint          ruff, formatting, types'
	@echo 'make coverage      lines of src/ that the fast tests reach'
	@echo 'make mutants       injects known faults; each must turn the tests red'
	@echo 'make bench         all benchmarks, hours; one: make bench NAME=step; the table: make bench NAME="table runs/benchmarks"'

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'error: no Python 3.11 or newer is on the PATH.'; \
	  echo '  next: install one, or name it: make PYTHON=/path/to/python3'; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing deltalab and its dependencies into $(VENV) (some minutes, once)'
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/deltalab demo

test: $(STAMP)
	@$(PYTEST) $(PARALLEL) -m 'not slow and not browser'

test-all: $(STAMP)
	@$(PYTEST) $(PARALLEL) -m 'not browser'

test-browser: $(STAMP)
	@$(PYTEST) -m browser

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

coverage: $(STAMP)
	@$(PYTEST) $(PARALLEL) -m 'not slow and not browser' --cov=deltalab --cov-report=term --cov-report=html --cov-fail-under=90

mutants: $(STAMP)
	@$(BIN)/python tools/mutants.py

bench: $(STAMP)
	@$(BIN)/python -m benchmarks $(or $(NAME),all)

clean:
	rm -rf .mypy_cache .ruff_cache .hypothesis htmlcov .coverage build dist
