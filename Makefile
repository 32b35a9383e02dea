# A machine needs Python 3.11 or newer and make. Every target creates .venv and installs into it first.
#
#   make demo      train retnet-tiny-conv on the standard library's source, score it beside gzip and sample from it
#   make test      tests that a small CPU machine runs in minutes
#   make test-all  every test that this machine can run; reports what was skipped and why
#   make docs      the documentation site, from docs/ into site/; it is read without a server or the network
#   make lint      ruff, basedpyright, import contracts
#   make dist      wheel and sdist in dist/, checked, and the wheel tested in empty environments (dev/dist.py)
#
# Settings: PYTHON (the interpreter of a new .venv), TORCH_INDEX (an index for torch only, such as PyTorch's CPU index),
# PIP_FLAGS, pip's own PIP_* variables and configuration files, TEST_JOBS, TEST_ARGS.

PYTHON ?= python3
VENV ?= .venv
TEST_JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) $(TEST_ARGS)

.PHONY: help venv install demo collect test test-all test-matrix docs dist lint format hooks clean

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

# One stamp for users' packages, one for developers'. Installation is repeated only after a change of pyproject.toml or
# constraints.txt.
define install
	$(if $(TORCH_INDEX),$(PIP) install $(PIP_FLAGS) --index-url $(TORCH_INDEX) -c constraints.txt torch)
	$(PIP) install $(PIP_FLAGS) -c constraints.txt -e '$(1)'
endef

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "retnet needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,.[train])
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,.[dev])
	@touch $(VENV)/.installed $@

venv install: $(VENV)/.installed-dev

# Train, evaluate, generate, check, describe. out/demo gets the model and three plots.
demo: $(VENV)/.installed
	$(BIN)/retnet train recipes/retnet-tiny_stdlib_cpu.yaml force=true
	$(BIN)/retnet eval out/demo --data stdlib
	$(BIN)/retnet generate out/demo "def " --max-tokens 1000 --seed 0 --png out/demo/stream.png --force
	$(BIN)/retnet check out/demo --text README.md --length 256
	$(BIN)/retnet info out/demo --png out/demo/model.png --force
	@echo "look:  out/demo/report.html, out/demo/stream.png, out/demo/model.png"
	@echo "next:  source $(BIN)/activate"
	@echo "       retnet generate out/demo 'import ' --max-tokens 0    an endless text; Ctrl-C ends it"
	@echo "       retnet chat out/demo                                 a conversation; it knows Python's syntax only"
	@echo "       docs/index.md                                        your own text, hybrids, a server, ..."

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not gpu and not slow"

# Imports what `make test` imports, which writes its bytecode.
collect: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --collect-only -q -m "not gpu and not slow"

test-all: $(VENV)/.installed-dev
	$(PIP) install $(PIP_FLAGS) -c constraints.txt -e '.[quantize,clients,docs,notebooks]'
	$(PYTEST) -rs
	$(MAKE) test-matrix
	$(MAKE) dist

# The tests that use transformers, with the oldest version that pyproject.toml allows.
test-matrix: $(VENV)/.installed-dev
	$(MAKE) VENV=.venv-oldest .venv-oldest/.installed-dev
	.venv-oldest/bin/python -m pip install $(PIP_FLAGS) "transformers==5.17.*"
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n $(TEST_JOBS) -m "not gpu" tests/hf tests/models tests/train tests/cli

docs: $(VENV)/.installed
	$(PIP) install $(PIP_FLAGS) -c constraints.txt -e '.[docs]'
	$(BIN)/python -m dev.site

dist:
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install $(PIP_FLAGS) build twine
	.venv-dist/bin/python dev/dist.py --python $(PYTHON) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.installed-dev
	$(BIN)/pre-commit install

clean:
	rm -rf out dist build site .pytest_cache .ruff_cache .hypothesis
