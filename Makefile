# Each target is a line or two that you could type by hand; `make help` lists them.
# A virtual environment of its own (.venv) is made with uv where the machine has it, else with Python's venv and pip.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
UV     := $(shell command -v uv 2>/dev/null)
# Where nvidia-smi answers, the CUDA build of JAX is taken; JAX=cpu|cuda12|cuda13|tpu decides by hand.
ifndef JAX
JAX    := $(shell nvidia-smi >/dev/null 2>&1 && echo cuda12 || echo cpu)
endif

# Set in many containers; every start would then compile all of JAX's Python again, two seconds of it.
export PYTHONDONTWRITEBYTECODE :=

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 18

train: $(VENV)/train-$(JAX)  ## from nothing to a small GPT that writes Python-like text (2 CPU cores: 2 minutes)
	@test -f data/stdlib_char/meta.json || $(BIN)/python data/stdlib_char/prepare.py
	$(BIN)/python train_jax.py config/train_stdlib_char.py --overwrite=True
	$(BIN)/python plot_jax.py out-stdlib-char
	$(BIN)/python sample_jax.py --out_dir=out-stdlib-char --start="def " --num_samples=2 --max_new_tokens=300

test: $(VENV)/dev-$(JAX)  ## the test suite (2 CPU cores: 6 minutes)
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=worksteal

test-all: $(VENV)/dev-$(JAX)  ## with its slow tests (2 CPU cores: 15 minutes)
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=worksteal -m ""

check: $(VENV)/train-$(JAX)  ## a self check in under a minute
	$(BIN)/python test_jax_transformer.py

torture: $(VENV)/dev-$(JAX)  ## kill a run fifty times, demand the very run never killed (2 CPU cores: 4 minutes)
	$(BIN)/python tests/torture.py --kills=50

lint: $(VENV)/dev-$(JAX)  ## ruff and mypy
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

clean:  ## remove the environment (data and runs stay)
	rm -rf $(VENV)

# ---- the environment -------------------------------------------------------------------------------------------------

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); try: make PYTHON=python3.12 ..."; exit 1; }
	$(if $(UV),$(UV) venv --quiet --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))

# Without byte code, as uv does it: Python compiles what it imports, the first time, which is far less than there is.
INSTALL = $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check)

$(VENV)/train-$(JAX): requirements_jax.txt | $(VENV)/bin/python
	@echo "installing packages into $(VENV) (JAX for $(JAX)), about a minute ..."
	$(INSTALL) -r requirements_jax.txt $(if $(filter-out cpu,$(JAX)),"jax[$(JAX)]")
	@touch $@

$(VENV)/dev-$(JAX): pyproject.toml microgpt/mlx/requirements.txt $(VENV)/train-$(JAX)
	$(INSTALL) $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"])')
	@$(INSTALL) -r microgpt/mlx/requirements.txt || echo "no MLX for this machine: tests of microgpt/mlx* will be skipped"
	@touch $@

.PHONY: help train test test-all check torture lint clean
