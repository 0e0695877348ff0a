PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test check slow test-gpu bench

demo: $(READY)        ## prune the embedded model by every method
	$(BIN)/llmsparse demo

test: $(READY)        ## the fast tests, two at a time
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow and not gpu"

check: $(READY)       ## format, lint, types
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/pyright --pythonpath $(BIN)/python

slow: $(READY)        ## the tests that take longer: kills, memory, official figures
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "slow and not gpu"

test-gpu: $(READY)    ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu

bench: $(READY)       ## what pruning and the kernels cost, side by side with the dense or published way
	$(BIN)/python -m eval.speed
	$(BIN)/python -m eval.cpu_speed
	$(BIN)/python -m eval.experts
	$(BIN)/python -m eval.kernels

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
