# make digits   the demonstration: one incremental run, with and without the delegator, on a CPU
# make example  a trained model of five classes learns five more, without the old images
# make test     style, types and tests
# make clean    removes the environment and the caches; runs/ stays
#
# All use .venv, made on the first call by the first of $(PYTHON) that runs and is 3.11 or 3.12.

PYTHON ?= python3 python3.12 python3.11
VENV := .venv
BIN := $(VENV)/bin
NOT_INSTALLED = { echo "error: pip could not install the packages, see above; fix that and run make again" >&2; exit 1; }

.PHONY: digits example test clean

digits: $(VENV)/.installed
	$(BIN)/python -m experiments.with_and_without_delegator --config=configs/digits.py --workdir=runs/digits

example: $(VENV)/.installed
	$(BIN)/python -m experiments.example --workdir=runs/example

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The probe runs each candidate: a version manager's stand-in may exist and yet start nothing, and
# a distribution's Python may come without what makes an environment.
$(BIN)/python:
	@for python in $(PYTHON); do \
	  if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1; \
	  then echo "making $(VENV) with $$python"; exec $$python -m venv $(VENV); fi; \
	done; \
	echo "error: none of these runs as Python 3.11 or 3.12 with venv: $(PYTHON); name one: make PYTHON=/path/to/python3.12" >&2; \
	exit 1

# Editable: the command skd-jax and the tests see the working tree.
$(VENV)/.installed: requirements.txt pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV), for the first time some 2 minutes"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt -e . || $(NOT_INSTALLED)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt -e '.[dev]' || $(NOT_INSTALLED)
	@touch $@
