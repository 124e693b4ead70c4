# Every target makes the environment it needs in .venv, from the versions pinned in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable

.PHONY: demo test test-slow test-gpu test-oldest test-integrations test-peft test-kernels test-deepspeed compatibility benchmark benchmark-inference sizes scale results check clean

demo: $(VENV)/demo.stamp  ## fine-tune, prune, merge and reload a real model on real data (about four minutes)
	$(BIN)/peft-pst demo

test: $(VENV)/test.stamp  ## the whole quick suite, docstrings and README included (under five minutes)
	$(BIN)/python -m pytest

test-slow: $(VENV)/test.stamp $(VENV)/demo.stamp  ## what takes minutes, the notebook, and what needs the demo's packages
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/test.stamp  ## what needs a CUDA device
	$(BIN)/python -m pytest -m gpu

test-oldest:  ## the quick suite with the oldest PEFT and transformers that are supported, in an environment of its own
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

INTEGRATIONS := tests/test_integrations.py tests/test_quantised.py tests/test_quantised_memory.py tests/test_exporters.py tests/test_sparse_kernels.py

test-integrations: $(VENV)/integrations.stamp  ## real runs in TRL, diffusers and others; quantised bases; ONNX, OpenVINO, MKL
	$(BIN)/python -m pytest -m "not gpu" $(INTEGRATIONS)

test-peft: $(VENV)/integrations.stamp  ## PEFT's own test-suite, fetched, with PST among the methods it tries (four minutes)
	$(BIN)/python -c "import setuptools" 2>/dev/null || $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) setuptools
	$(BIN)/python tests/peft_suite.py

compatibility: $(VENV)/test.stamp  ## write docs/compatibility.md and its part of the README anew
	$(BIN)/python tests/compatibility_page.py

test-kernels: $(VENV)/test.stamp  ## the GPU kernels without a GPU: interpreted, and compiled for two kinds (four minutes)
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet triton==3.9.0
	$(BIN)/python -m pytest -m slow tests/test_kernels.py

test-deepspeed: $(VENV)/test.stamp  ## ZeRO-2 and ZeRO-3 on two processes; DeepSpeed compiles an operator, with the system's C++ compiler (six minutes)
	$(BIN)/python -c "import deepspeed" 2>/dev/null || DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet \
		--no-build-isolation --constraint $(CONSTRAINTS) setuptools deepspeed==0.19.8 ninja==1.13.2
	rm -f $(VENV)/torch_extensions/*/*/lock  # of a build that was interrupted, for which the next would wait for ever
	PATH="$(abspath $(BIN)):$$PATH" TORCH_EXTENSIONS_DIR=$(abspath $(VENV))/torch_extensions \
		$(BIN)/python -m pytest -m slow tests/test_distributed_deepspeed.py tests/test_distributed_deepspeed_trainer.py

COST := $(BIN)/python benchmarks/training_cost.py --output benchmarks/results/training_cost

benchmark: $(VENV)/test.stamp  ## what a training step costs, on an otherwise idle machine (about twenty minutes)
	$(COST)
	$(COST) --precision bf16
	$(COST) --layers 1 --methods products full ours --no-memory --repeats 7
	$(COST) --layers 1 --methods products full ours --no-memory --accumulate 8 --repeats 3
	$(COST) --precision bf16 --scaling --repeats 3

sizes: $(VENV)/test.stamp  ## what compact files of a model of BERT-base's shape take (under a minute)
	$(BIN)/python benchmarks/compact_sizes.py --output benchmarks/results/compact_sizes

scale: $(VENV)/test.stamp  ## the formula of docs/scale.md against this machine, and what it predicts (two minutes)
	$(BIN)/python benchmarks/scale.py --output benchmarks/results/scale

INFERENCE := $(BIN)/python benchmarks/inference.py --output benchmarks/results/inference

benchmark-inference: $(VENV)/integrations.stamp  ## what zeros buy at inference, on an otherwise idle machine (five minutes)
	$(INFERENCE) layers
	$(INFERENCE) layers --threads 2
	$(INFERENCE) models
	$(INFERENCE) runtimes

benchmark-quantised: $(VENV)/integrations.stamp  ## what training on a quantised base takes in memory (ten minutes)
	$(BIN)/python benchmarks/quantised_memory.py --output benchmarks/results/quantised_memory

SETTINGS ?= benchmarks/results/settings/minilm-sst2.yaml
RESULTS := $(BIN)/python -m benchmarks.results

results: $(VENV)/benchmarks.stamp $(VENV)/demo.stamp  ## the table of SETTINGS (many hours on a CPU; goes on where it was stopped)
	$(RESULTS) search $(SETTINGS)
	$(RESULTS) run $(SETTINGS)
	$(RESULTS) table $(SETTINGS)

check: $(VENV)/test.stamp  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/%.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) ".[$*]"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
