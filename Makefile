# `make` lists the targets. Each of them sets up what it needs first, in `.venv` and nowhere else.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick check format lock clean

# Interpreter that makes .venv; without it the first fitting one of python3, python3.13, 3.12, 3.11.
export PYTHON ?=
# Build of PyTorch: auto, cpu, cu126, cu130, ...; without it the one .venv has, at first `auto`:
# the CPU build unless an NVIDIA driver is found.
export ABE_TORCH ?= $(or $(patsubst .venv/.setup-%,%,$(wildcard .venv/.setup-*)),auto)

# The stamp's name is the build that was installed, its content the directory it was installed in.
STAMP := .venv/.setup-$(ABE_TORCH)
ifneq "$(shell test -x .venv/bin/python && cat $(STAMP) 2>/dev/null)" "$(CURDIR)"
.PHONY: $(STAMP)
endif

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo '  PYTHON=python3.12   interpreter for .venv (after make clean)'
	@echo '  ABE_TORCH=cu126     build of PyTorch: auto (default), cpu, cu126, cu130, ...'

setup: $(STAMP)  ## make .venv from requirements.lock; does nothing while that is up to date

$(STAMP): requirements.lock pyproject.toml tools/setup.sh
	bash tools/setup.sh

demo: setup  ## train a small ensemble on built-in images and write a report of it
	$(BIN)/abe demo

test: setup  ## run all tests
	$(PYTEST)

test-quick: setup  ## run the tests that take seconds
	$(PYTEST) -m 'not slow'

check: setup  ## what CI runs: format, lint, types, all tests and the README's code blocks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

format: setup  ## format the code and apply the linter's safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Versions already in the lock stay unless UPGRADE="name name" asks for newer ones. What a CUDA build
# of PyTorch needs is left out: that build pins it itself, and no other build needs it.
lock: setup  ## write requirements.lock anew from pyproject.toml; UPGRADE="ruff mypy" for newer ones
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --group dev \
	  --no-annotate --custom-compile-command 'make lock' $(UPGRADE:%=--upgrade-package %) \
	  --output-file requirements.lock pyproject.toml
	sed -i.bak -E '/^(nvidia-|cuda-|triton)/d' requirements.lock && rm requirements.lock.bak

clean:  ## remove .venv, caches and builds; runs/ and demo/ stay
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +
