# Needs make and a Python >= 3.11 with venv; the first use of a target installs what it needs.
#   make train [ARGS="--steps 500"] [PYTHON=python3.12]

PYTHON ?= python3
ARGS ?=
BENCHMARKS ?= step sharding codecs links wire_audit aggregate pace libsvm linear sdca cocoa context pipeline tensor
NAME ?=

# One environment per Python version, so that two of them live side by side.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv-$(VERSION)
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help train experiment named test test-slow test-tpu lint bench bench-peers run-benchmarks clean

help:
	@echo 'make train   train a small transformer on eight simulated devices; again: resume'
	@echo 'make experiment NAME=ensemble  any of experiments/, with what it needs'
	@echo 'make test    lint, type check and the tests but the slow ones'
	@echo 'make test-slow  the tests that take long, and further cases of what the others have'
	@echo 'make lint    ruff and mypy alone'
	@echo 'make test-tpu  the tests that compile for TPU topologies; needs no TPU, x86 Linux only'
	@echo 'make bench   the benchmarks, or those in BENCHMARKS=links; links needs root on Linux'
	@echo 'make bench-peers  the same beside PyTorch, whose rows make bench leaves out; also'
	@echo '             BENCHMARKS=transformer, gpu (on a machine with one), and time_to_loss, which'
	@echo '             takes about an hour'
	@echo 'make clean   remove environments and caches; keeps runs/'
	@echo 'Options: PYTHON=python3.12 picks the interpreter; ARGS="..." goes to the program that'
	@echo 'is run (make train ARGS=--help lists the options of training).'

train: $(VENV)/installed-plots
	$(BIN)/python experiments/train_lm/run.py $(ARGS)

experiment: named $(VENV)/installed-experiments
	$(BIN)/python experiments/$(NAME)/run.py $(ARGS)

named:
	@test -f 'experiments/$(NAME)/run.py' || { \
	echo 'make experiment NAME=...: one of'; ls experiments/*/run.py; exit 1; }

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow' $(ARGS)

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

# In an environment of its own: with libtpu beside it, JAX would look for a TPU everywhere else.
test-tpu:
	$(MAKE) VENV=$(VENV)-tpu $(VENV)-tpu/installed-test,tpu
	$(VENV)-tpu/bin/python -m pytest -m tpu_compile $(ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/installed-test run-benchmarks

run-benchmarks:
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name $(ARGS); done

# In an environment of its own, for PyTorch is large. Where pip would fetch it with CUDA libraries:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make bench-peers
bench-peers:
	$(MAKE) VENV=$(VENV)-peers $(VENV)-peers/installed-test,peers
	$(MAKE) VENV=$(VENV)-peers BENCHMARKS="$(BENCHMARKS)" run-benchmarks

clean:
	rm -rf .venv-*/ .cache build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(check_python)
	$(PYTHON) -m venv --clear $(VENV)

# Done again when pyproject.toml or the interpreter is newer. An environment without pip is one
# whose making was interrupted.
$(VENV)/installed-%: pyproject.toml $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@

define check_python
command -v $(PYTHON) >/dev/null || { \
	echo '$(PYTHON): not found. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python'; \
	exit 1; }; \
$(PYTHON) -c 'import sys' || { \
	echo '$(PYTHON) does not start. Name another: make PYTHON=/path/to/python'; \
	exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "jdml needs Python 3.11 or newer; $(PYTHON) is $(VERSION)." \
	     "Name another: make PYTHON=python3.12"; \
	exit 1; }; \
$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	echo "$(PYTHON) has no venv module (Debian, Ubuntu: apt install python$(VERSION)-venv)." \
	     "Install it, or name another: make PYTHON=/path/to/python"; \
	exit 1; }
endef
