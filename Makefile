# Everything the house can do. `make` alone lists it. Each target sets up what it needs by itself.
# Needs: Python 3.11 or newer with venv, make; the network only to install locked, hashed packages.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
# Servers and commands are started many times: what is compiled once is kept. Empty is as good as not set.
export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
RUN := $(BIN)/python
PIP := $(RUN) -m pip --disable-pip-version-check --no-input
RUNTIME := .venv/.runtime
DEV := .venv/.dev
NODE := node_modules/.stamp
RIVAL := bench/node_modules/.stamp
DATA ?= retrofill-data
QUICK ?=

.PHONY: help setup demo test test-fast test-long check format bench bench-long serve lock clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(RUNTIME) ## make .venv with the command .venv/bin/retrofill
	@echo "Ready: $(BIN)/retrofill --help"

demo: $(RUNTIME) ## send two real histories into a fresh server, read them back, undo one
	@$(RUN) demo/histories.py

test: $(DEV) ## all tests but the long ones, under ten minutes
	@$(RUN) -m pytest -q -n 3 --dist load --maxschedchunk 1 -m "not long"

test-fast: $(DEV) ## tests without processes and sockets, two or three minutes
	@$(RUN) -m pytest -q -n 2 --dist load --maxschedchunk 1 -m "not slow and not long"

test-long: $(DEV) $(NODE) ## the long tests: 200 kills, Node's SDK, wide searches
	@HYPOTHESIS_PROFILE=long $(RUN) -m pytest -q -n 2 --dist worksteal -m "long or hypothesis" --timeout 3600

check: $(DEV) ## format, lint, types, floors, docs
	@$(RUN) -m ruff format --check --quiet . || { echo "Mend with: make format"; exit 1; }
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m mypy
	@$(RUN) -m pytest -q tests/manners

format: $(DEV) ## lay the code out and mend what can be mended by itself
	@$(RUN) -m ruff check --fix --quiet . || true
	@$(RUN) -m ruff format --quiet .

bench: $(DEV) ## measure, ten minutes at most; QUICK=1 under two
	@$(MAKE) -s $(RIVAL) || echo "npm gives no mixpanel-import: its row is not run"
	@$(RUN) bench/backfill.py $(if $(QUICK),--quick)
	@$(RUN) bench/run.py $(if $(QUICK),--quick)
	@$(RUN) bench/imports.py $(if $(QUICK),--quick)

bench-long: $(DEV) ## measure with 10 M events stored and 20 M sent, 90 minutes at most
	@$(MAKE) -s $(RIVAL) || echo "npm gives no mixpanel-import: its row is not run"
	@$(RUN) bench/backfill.py --long
	@$(RUN) bench/run.py --long
	@$(RUN) bench/imports.py --long

serve: $(RUNTIME) ## serve on 127.0.0.1:8090; DATA=folder
	@$(BIN)/retrofill serve --data $(DATA)

lock: $(DEV) ## write the locks anew from pyproject.toml
	@for lock in requirements requirements-dev; do \
	  groups="--group build"; [ $$lock = requirements ] || groups="--group dev"; \
	  $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate \
	    --no-header --no-emit-index-url pyproject.toml $$groups -o $$lock.lock; \
	done

clean: ## remove what was made, except data directories
	@rm -rf .venv node_modules bench/node_modules .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "Python 3.11 or newer is needed. Give it as: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -m venv .venv \
	  || { rm -rf .venv; echo "Python has no venv. On Debian: sudo apt-get install python3-venv" >&2; exit 2; }

# Wheels alone, every one by its hash, compiled when first imported; then the project itself, which needs nothing more.
$(RUNTIME): requirements.lock pyproject.toml | $(RUN)
	@echo "Setting up .venv"
	@$(PIP) install -qq --no-compile --require-hashes --only-binary :all: -r requirements.lock
	@$(PIP) install -qq --no-deps --no-build-isolation --no-index --editable .
	@touch $@

$(DEV): requirements-dev.lock $(RUNTIME)
	@echo "Setting up the tools for tests"
	@$(PIP) install -qq --no-compile --require-hashes --only-binary :all: -r requirements-dev.lock
	@touch $@

$(NODE): package-lock.json
	@npm ci --silent --no-audit --no-fund
	@touch $@

$(RIVAL): bench/package-lock.json
	@cd bench && npm ci --silent --no-audit --no-fund --ignore-scripts
	@touch $@
