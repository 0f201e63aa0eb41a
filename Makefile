# `make demo` and `make test` are all that a newcomer needs; both set themselves up.
SHELL := /bin/bash
VENV  := .venv
BIN   := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP   := $(BIN)/python -m pip install -qq -c constraints.txt
OUT   ?= demo

.PHONY: help demo test test-all check notebooks readme setup clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.13 is needed: install it, or say where it is with PYTHON=…" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "Python 3.11 to 3.13 is needed, and $(PYTHON) is another: say which with PYTHON=…" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.package: $(BIN)/python settings.ini setup.py constraints.txt
	@echo "installing the package and what it needs (once)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	@echo "installing what the tests need (once)"
	@$(PIP) -e '.[dev-core]'
	@touch $@

$(VENV)/.nussl: $(VENV)/.dev
	@bash .ci/system-packages
	@if bash .ci/system-packages --have-sox; then $(PIP) -e '.[nussl]' || echo "nussl did not install: its tests will be skipped"; fi
	@touch $@

setup: $(VENV)/.nussl ## install everything that the tests need

demo: $(VENV)/.package ## the first run: train, print Table 1, separate two songs (offline, minutes)
	@$(BIN)/deepdemix demo --out $(OUT)

check: $(VENV)/.nussl ## the notebooks are clean, and package and README follow from them
	@$(BIN)/python nbs/_site/check.py

test: export OMP_NUM_THREADS := 1
test: check ## what CI runs: notebooks, then tests
	@$(BIN)/nbdev_test --n_workers 2
	@$(BIN)/python -m pytest tests -q -m "not browser" -p no:cacheprovider

test-all: check ## the slow tests too
	@$(BIN)/nbdev_test --n_workers 2 --flags slow
	@$(BIN)/python -m pytest tests -q --all -m "not browser"

notebooks: $(VENV)/.nussl ## run every notebook top to bottom and save its outputs
	@$(BIN)/python nbs/_site/execute.py $(sort $(wildcard nbs/*.ipynb))
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(MAKE) --no-print-directory readme

readme: $(VENV)/.dev ## README.md from nbs/index.ipynb
	@$(BIN)/python nbs/_site/readme.py

clean: ## remove what the other targets made, the environment included
	rm -rf $(VENV) _docs _proc build dist *.egg-info
