# Two commands do everything: `make demo` and `make test`. Each makes its own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
# What depends on Megatron-Core's version.
MEGATRON_TESTS := tests/e2e/test_resume.py $(addprefix tests/distributed/test_,$(addsuffix .py,\
	layouts combinations reshard experts lora weights plan))
PYTEST_ARGS ?=
# Whole modules to a worker, whose tests share processes; in the order of the folders, long ones first.
PYTEST := $(BIN)/python -m pytest --durations=20
SPREAD := -n $(WORKERS) --dist loadscope --no-loadscope-reorder

# Python 3.12 brings megatron-core 0.19; pyenv hides it behind a version variable.
PYTHON312 ?= $(shell for v in "" $$(pyenv versions --bare 2>/dev/null | grep '^3\.12'); do \
	PYENV_VERSION=$$v python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null && break; done)

.PHONY: help demo test test-all sglang test-sglang test-py312 lint bench clean

help:            ## show this help
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

demo: $(STAMP)   ## train a small bilingual model, distil it crosslingually, plot what it learned
	$(BIN)/copsd demo $(DEMO_ARGS)

# Workers share the cores, and threads that wait for a core spin.
test test-all test-sglang: export OMP_NUM_THREADS ?= 1

test: $(STAMP)   ## the default test suite
	$(PYTEST) $(SPREAD) -m "not slow and not sglang" $(PYTEST_ARGS)

test-all: sglang  ## every test, the slow ones too
	$(PYTEST) $(PYTEST_ARGS)

sglang: $(STAMP)  ## the environment of SGLang's servers: 11 GB in the user's cache, shared by all checkouts
	$(BIN)/copsd sglang-env

test-sglang: sglang  ## rollouts, weight sync and faults with real SGLang servers
	$(PYTEST) $(SPREAD) -m "sglang and not slow" $(PYTEST_ARGS) tests/sglang

test-py312:      ## the parts that depend on Megatron-Core's version, under Python 3.12 and megatron-core 0.19
	@if [ -z "$(PYTHON312)" ]; then echo "no Python 3.12 on this machine: megatron-core 0.19 is not exercised"; else \
	$(MAKE) PYTHON="$(PYTHON312)" VENV=.venv312 PYTEST_ARGS="$(MEGATRON_TESTS)" test; fi

lint: $(STAMP)   ## ruff, and mypy on what is imported by others
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## time and memory of the loss against the dense way
	$(BIN)/copsd bench loss

clean:           ## remove environments and runs
	rm -rf .venv .venv312 runs
