# make demo | test | test-all | check | bench | docs | clean
# Needs python3 >= 3.11 and a package index. Everything is installed inside this folder: hatch into .hatch/, the
# environment into .venv/ (some 7 GB); the system Python is never touched.
SHELL := /bin/bash
PYTHON ?= python3
READY := .venv/.ready
RUN := .venv/bin/python
INPUTS := pyproject.toml constraints.txt $(wildcard packages/*/pyproject.toml)

.PHONY: demo test test-all check bench docs clean environment

demo: environment
	$(RUN) -m multicrafter demo --out runs/demo

test: environment
	$(RUN) -m pytest -m "not slow and not gpu"

test-all: environment
	$(RUN) -m pytest

check: environment
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	for leaf in gspo idar moe_lora id_reward; do MYPYPATH=packages/$$leaf/src $(RUN) -m mypy --strict packages/$$leaf/src || exit 1; done
	.venv/bin/lint-imports
	$(RUN) tests/check_fragments.py
	$(RUN) -m pytest -q -p no:cacheprovider --doctest-modules packages/*/src --ignore-glob='*/integrations/*' --ignore-glob='*/backends/*'

bench: environment
	$(RUN) -m pytest packages/*/benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds -o python_files='bench_*.py'

docs: environment
	$(RUN) -m mkdocs build --strict

environment: $(READY)

.hatch/bin/hatch:
	@echo "==> installing hatch into .hatch/ (once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; set PYTHON=python3.11 or newer" >&2; exit 2; }
	@rm -rf .hatch && $(PYTHON) -m venv .hatch || { echo "error: $(PYTHON) has no venv module; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@.hatch/bin/python -m pip install --quiet --disable-pip-version-check hatch==1.18.2

$(READY): $(INPUTS) | .hatch/bin/hatch
	@echo "==> creating the environment in .venv/ (some 7 GB, a few minutes; later runs reuse it)"
	@rm -rf .venv
	PIP_CONSTRAINT="$(CURDIR)/constraints.txt" .hatch/bin/python -m hatch env create default
	@touch $(READY)

clean:
	rm -rf .venv .hatch runs site .mypy_cache .ruff_cache .pytest_cache
