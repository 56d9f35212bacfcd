# `make demo` shows visq at work, `make test` checks everything. Both set up .venv first; that takes
# some minutes once, and no time as long as pyproject.toml and constraints.txt stay the same.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

FAULT_ROUNDS ?= 200
FAULT_SEED ?= 1

.PHONY: help install demo test faults lint format clean

help:
	@echo "make demo     set up, start everything on this machine, answer questions on pictures"
	@echo "make test     format, lint, types, imports between the rooms, tests"
	@echo "make lint     the same without the tests"
	@echo "make faults   the long tests of faults: FAULT_ROUNDS rounds (200), FAULT_SEED (1)"
	@echo "make format   format the code and mend what can be mended"
	@echo "make install  set up $(VENV)"
	@echo "make clean    remove $(VENV) and caches"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "visq needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet \
		--constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/visq demo

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: lint
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

faults: $(INSTALLED)
	$(BIN)/python -m tests.faults.rounds --rounds $(FAULT_ROUNDS) --seed $(FAULT_SEED)

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist
