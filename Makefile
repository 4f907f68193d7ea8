# The two that matter: `make train` and `make test`. Both set up .venv by themselves.
SHELL = /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Versions to install: the tested ones, constraints-oldest.txt, or /dev/null for the newest
CONSTRAINTS ?= constraints.txt

ENV ?= InvertedDoublePendulum-v5
STEPS ?= 15000
ARGS ?=

SUITE ?= sb3

LINT_PATHS = sb3_qsm tests examples benchmarks

# What all tests need; with EXTRAS=tests those of other extras are skipped
EXTRAS ?= tests,benchmarks,export
TESTS = $(VENV)/.$(EXTRAS)

# One process for each core
PYTEST = $(BIN)/python -m pytest -n auto --dist worksteal

export PYTHONHASHSEED = 0

train: $(VENV)/.zoo
	$(BIN)/sb3-qsm train --env $(ENV) -n $(STEPS) --tensorboard-log logs/tensorboard --progress $(ARGS)
	$(BIN)/sb3-qsm plot

# make test ARGS="-m expensive" runs the slow ones: killed runs, ONNX of all policies, Ray
test pytest: $(TESTS)
	$(PYTEST) -m "not expensive" $(ARGS)

coverage: $(TESTS)
	$(PYTEST) -m "not expensive" --cov=sb3_qsm $(ARGS)

conformance: $(TESTS)
	$(BIN)/python tests/conformance/run.py --suite $(SUITE) $(ARGS)

smoke: $(VENV)/.benchmarks
	$(BIN)/python -m benchmarks run smoke --jobs 2
	$(BIN)/python -m benchmarks report smoke

type: $(TESTS)
	$(BIN)/mypy

lint: $(TESTS)
	$(BIN)/ruff check $(LINT_PATHS)

format: $(TESTS)
	$(BIN)/ruff check --select I --fix $(LINT_PATHS)
	$(BIN)/ruff format $(LINT_PATHS)

check-codestyle: $(TESTS)
	$(BIN)/ruff check --select I $(LINT_PATHS)
	$(BIN)/ruff format --check $(LINT_PATHS)

commit-checks: format type lint

doc: $(VENV)/.docs
	$(BIN)/sphinx-build -W -b html docs docs/_build/html

# Wheel and sdist, each installed into an empty environment, where a policy that comes along plays an episode
dist:
	rm -rf dist build
	$(PYTHON) -m venv build/tools && build/tools/bin/python -m pip install -q build && build/tools/bin/python -m build
	for file in $$PWD/dist/*; do \
	    rm -rf build/empty && $(PYTHON) -m venv build/empty \
	    && build/empty/bin/python -m pip install -q -c $(CONSTRAINTS) "$$file[mujoco]" \
	    && (cd build/empty && bin/sb3-qsm enjoy HalfCheetah-v5 --no-render -n 1) || exit 1; \
	done

venv: $(TESTS)

# One stamp for each set of extras, made anew when a dependency changes
$(VENV)/.%: setup.cfg $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$*]"
	touch $@

clean:
	rm -rf build dist *.egg-info docs/_build .mypy_cache .pytest_cache .ruff_cache .coverage

.PHONY: train test pytest coverage conformance smoke type lint format check-codestyle commit-checks doc dist venv clean
