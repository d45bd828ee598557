# make quickstart   train and compare two small models on this machine (CPU or GPU); no download of data
# make test         style, types and tests on the CPU
# make lint         style and types only
#
# Each creates .venv and installs the package there when pyproject.toml has changed, and starts at once otherwise.
# Another interpreter or place:   make test PYTHON=python3.12 VENV=/tmp/venv

VENV ?= .venv
# The first interpreter that is new enough and can create environments.
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	"$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo "$$candidate"; break; }; done)
# Where the quickstart leaves its checkpoints, tables, plots and report: a new folder each time.
OUTPUT ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
# Test processes, each of one thread: as many as there are processors, and at most eight.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ "$$n" -le 8 ] || n=8; echo "$$n")

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: quickstart test lint install

quickstart: $(INSTALLED)
	$(BIN)/loglinear quickstart --output $(OUTPUT)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python

install: $(INSTALLED)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with the venv module was found: name one with" \
		"PYTHON=/path/to/python" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): a few minutes, once."
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(INSTALLED_DEV): pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): a few minutes, once."
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(INSTALLED) $@
