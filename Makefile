# make demo | test | test-all | test-gpu | test-serve | fuzz | check | wheels | lowest | bench | bench-gpu | docs | clean
# Needs python3 >= 3.11 and a package index. Everything is installed inside this folder: hatch into .hatch/, the
# environment into .venv/ (some 7 GB); the system Python is never touched. `make clean` removes both.
SHELL := /bin/bash
PYTHON ?= python3
HATCH_VERSION := 1.18.2
WORKERS ?= 2
RUN := .venv/bin/python
READY := .venv/.ready
INPUTS := pyproject.toml constraints.txt $(wildcard packages/*/pyproject.toml)
LEAVES := gspo idar moe_lora id_reward
PACKAGES ?= $(LEAVES) multicrafter
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
HATCH := PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	HATCH_CONFIG=.hatch/config.toml HATCH_DATA_DIR=.hatch/data HATCH_CACHE_DIR=.hatch/cache .hatch/bin/python -m hatch

.PHONY: demo test test-all test-gpu test-serve fuzz check wheels lowest bench bench-gpu bench-science bench-science-smoke docs clean environment help
.PHONY: check-style check-types check-imports check-fragments check-doctests

help:
	@echo "make demo      train both stages on the shipped tiny model, evaluate, write a report into runs/demo"
	@echo "make test      the tests that take seconds ($(WORKERS) workers; WORKERS=4 for more)"
	@echo "make test-all  the slow ones as well"
	@echo "make test-gpu  the tests that need a CUDA card; each is skipped where there is none"
	@echo "make test-serve  the web page in a Chromium (apt-get install chromium), in an environment of its own"
	@echo "make fuzz      wrong input of every kind, FUZZ=1000 examples of each"
	@echo "make check     ruff, mypy, import rules, changelog fragments, doctests, docs"
	@echo "make wheels    wheels and source archives into dist/ (PACKAGES=gspo for one), and their tests"
	@echo "make lowest    the tests of the leaves with the oldest versions they allow (PACKAGES=gspo for one)"
	@echo "make bench     all micro-benchmarks in smoke size (BENCH_SIZE=full for real figures)"
	@echo "make bench-gpu the timings and the memory of each part on a CUDA card, into runs/bench/gpu.json"
	@echo "make bench-science        what is missing of the studies (hours; python -m studies.all --minutes 100 for a piece)"
	@echo "make bench-science-smoke  every study in miniature (minutes)"
	@echo "make docs      the site, into site/"
	@echo "make clean     remove .venv, .hatch, runs and caches"

demo: environment
	$(RUN) -m multicrafter demo --out runs/demo

test: environment
	$(ONE_THREAD) $(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not gpu"

test-all: environment
	$(RUN) -m pytest -m "not gpu"

test-gpu: environment
	$(RUN) -m pytest -m gpu -rs

# gradio asks for older versions of two packages than constraints.txt has, so it sits in an environment on top of .venv.
test-serve: .venv-serve/.ready
	$(ONE_THREAD) .venv-serve/bin/python -m pytest packages/multicrafter/tests/test_multicrafter_serve*.py tests/test_repo_space.py

.venv-serve/.ready: constraints-serve.txt $(READY)
	rm -rf .venv-serve && $(RUN) -m venv .venv-serve
	echo "import site; site.addsitedir('$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > $$(.venv-serve/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	.venv-serve/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-serve.txt
	@touch $@

fuzz: environment
	FUZZ=$${FUZZ:-1000} $(ONE_THREAD) $(RUN) -m pytest packages/multicrafter/tests/test_multicrafter_fuzz.py

# Side by side on $(WORKERS) cores; what each says stays together.
check: environment
	@$(MAKE) --no-print-directory --jobs $(WORKERS) $(if $(filter output-sync,$(.FEATURES)),--output-sync) \
	  check-types check-doctests docs check-imports check-style check-fragments

check-style: environment
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

check-types: environment
	$(RUN) -m mypy packages/*/src

check-imports: environment
	.venv/bin/lint-imports

check-fragments: environment
	$(RUN) tests/check_fragments.py

check-doctests: environment
	$(ONE_THREAD) $(RUN) -m pytest --doctest-modules packages/*/src --ignore packages/id_reward/src/id_reward/integrations/flow_factory.py

wheels: environment
	rm -rf dist
	for package in $(PACKAGES); do (cd packages/$$package && ../../$(RUN) -m hatchling build -d ../../dist) || exit 1; done
	$(RUN) -m twine check --strict dist/*
	$(RUN) -m pytest tests/test_repo_wheels.py

# Direct dependencies and extras at their lower bounds, the tools for testing new. Not multicrafter: its tests need what the environment has.
lowest: .hatch/.ready
	for package in $(filter $(LEAVES),$(PACKAGES)); do \
	  .hatch/bin/uv venv --quiet --clear --python .hatch/bin/python .lowest/$$package && \
	  .hatch/bin/uv pip install --quiet --python .lowest/$$package --resolution lowest-direct --all-extras -c constraints-lowest.txt -r packages/$$package/pyproject.toml && \
	  .hatch/bin/uv pip install --quiet --python .lowest/$$package beartype hypothesis pytest pytest-benchmark && \
	  .hatch/bin/uv pip install --quiet --python .lowest/$$package --no-deps -e packages/$$package && \
	  .lowest/$$package/bin/python -m pytest -m "not slow and not gpu" packages/$$package/tests || exit 1; \
	done

bench: environment
	$(RUN) benchmarks/run.py

bench-gpu: environment
	$(RUN) -m benchmarks.gpu

bench-science: environment
	$(RUN) -m studies.all

bench-science-smoke: environment
	$(RUN) -m studies.all --smoke

docs: environment
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

environment: $(READY)

# Written last, so that an interrupted installation starts afresh.
.hatch/.ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is missing or older than 3.11; say make PYTHON=python3.12, for example" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "error: $(PYTHON) cannot make environments; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 2; }
	@echo "==> installing hatch $(HATCH_VERSION) into .hatch/ (once)"
	@rm -rf .hatch && $(PYTHON) -m venv .hatch
	@.hatch/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt hatch==$(HATCH_VERSION)
	@touch .hatch/config.toml $@

# A complete environment is brought up to date when a pyproject.toml changed; an incomplete one, or one of other
# constraints, is made anew (pip's cache makes that a matter of a minute or two).
$(READY): $(INPUTS) | .hatch/.ready
	@if [ -e $(READY) ] && cmp -s constraints.txt .venv/constraints.txt; then \
	  echo "==> a pyproject.toml changed: bringing .venv/ up to date"; \
	  $(HATCH) run default:python -m pip install --quiet --no-deps --no-build-isolation $(patsubst %/pyproject.toml,-e %,$(wildcard packages/*/pyproject.toml)); \
	else \
	  echo "==> creating the environment in .venv/ (some 7 GB, a few minutes; later runs reuse it)"; \
	  rm -rf .venv && $(HATCH) env create default && cp constraints.txt .venv/; \
	fi
	@touch $@

clean:
	rm -rf .venv .venv-serve .hatch .lowest dist runs site .benchmarks .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .cache .hypothesis
