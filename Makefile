# Everything people and CI run. `make demo` and `make test` need nothing but Python 3.11 or later; they make .venv themselves.
# Variables: PYTHON (interpreter for .venv), VENV (where it goes), PYTEST_ARGS (for `make test…`), GPU_EXTRAS (for `make test-gpu`:
# the targets to install; `tensorrt`, for cards that TensorRT-RTX does not take, brings several GB).

VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
GPU_EXTRAS ?= cuda,rtx
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The first interpreter that is recent enough; named only when .venv has to be made.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

# Of the small model that ships (benchmarks/moving_shapes/checkpoint), which knows coloured shapes and nothing else.
DEMO_PROMPT := a red circle moves right on a blue background
DEMO_OPTIONS := --size 128x96 --frames 33 --steps 30 --guidance 3 --seed 8

.PHONY: help demo test test-engines test-emulated test-gpu check format clean
.DEFAULT_GOAL := help

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1  \2/p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-demo  ## small trained checkpoint → bundle → demo.mp4 and demo.png
	$(BIN)/wanrt build-engines benchmarks/moving_shapes/checkpoint --out demo/bundle
	$(BIN)/wanrt run demo/bundle --prompt "$(DEMO_PROMPT)" $(DEMO_OPTIONS) --out demo.mp4
	$(BIN)/python -m benchmarks.demo demo.mp4 --out demo.png

test: $(VENV)/.installed-dev  ## all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-engines: $(VENV)/.installed-dev  ## every TensorRT engine there is: all stages, variants, precisions and architectures
	$(BIN)/python -m pytest -m engines $(PYTEST_ARGS)

test-emulated: $(VENV)/.installed-dev  ## the GPU tests of the cuda target on an emulated GPU, without NVIDIA's libraries; needs g++
	$(BIN)/python -m pytest -p tests.emulator.plugin tests/gpu $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed-gpu-$(GPU_EXTRAS)  ## what this machine's NVIDIA GPU runs: each target's tests, and a verdict
	$(BIN)/python -m pytest -p tests.gpu.verdict tests/gpu tests/test_backend_contract.py $(PYTEST_ARGS)

check: $(VENV)/.installed-dev  ## lint, format and types, without changing a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## sort imports and format
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

clean:  ## remove what the other targets left, .venv included
	rm -rf $(VENV) demo demo.mp4 demo.mp4.json demo.png build dist wanrt.egg-info .pytest_cache .mypy_cache .ruff_cache

# A stamp is written last, so an interrupted install starts again; it ages when the requirements change.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later found" >&2; echo "hint: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable '.[cpu,export]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable '.[cpu,export,dev]'
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-gpu-$(GPU_EXTRAS): $(VENV)/.installed-dev
	$(PIP_INSTALL) --editable '.[cpu,export,dev,$(GPU_EXTRAS)]'
	@touch $@
