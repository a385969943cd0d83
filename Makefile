# Everything runs in .venv; `make demo` on a fresh machine creates it first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup test lint check demo docs clean

# torch first, and by version. Which build it is depends on where pip looks: PIP_ARGS is handed to it, e.g. an index that
# holds CPU builds.
PIP_ARGS ?=
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

setup: $(VENV)/ready

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/make_cli_reference.py --check

check: lint test

demo: setup
	$(BIN)/growlm demo

docs: setup
	$(BIN)/python docs/make_cli_reference.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-out
