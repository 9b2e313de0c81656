# The two commands of a fresh machine are `make demo` and `make test`; both build .venv first if it is missing.
# Needed: Python 3.11 (with venv and pip), make and a C++ compiler. Variables that can be given on the command line:
#   PYTHON   the interpreter that .venv is made with (default: python3.11, else python3)
#   VARIANT  cpu or cuda, the lock to install (default: cuda if nvidia-smi finds a GPU)
#   ARGS     further arguments for pytest or the demo

PYTHON  ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && command -v $$p && break; done)
VARIANT ?= $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU ' && echo cuda || echo cpu)
ARGS    ?=
PYTHON  := $(PYTHON)
VARIANT := $(VARIANT)
PY      := .venv/bin/python

# No model or data set is ever fetched, and nothing is reported to anyone.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
# GiB of KV cache per CPU engine. vLLM's own default takes a share of the whole machine.
export VLLM_CPU_KVCACHE_SPACE ?= 1
# Dozens of processes import torch and vLLM here: without bytecode each would compile them again.
unexport PYTHONDONTWRITEBYTECODE
# Threads that wait should not spin: with other work on the machine, spinning made small models ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE

LOCK   := requirements/$(VARIANT)-py311.lock
RELEASES := 0.31.0
ALIAS  := $(if $(filter cpu,$(VARIANT)),--alias requirements/vllm-alias)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-releases lint clean peers-llmcompressor peers-llamacpp

help:
	@echo "make demo                 specialise and serve the lab model; results in demo/"
	@echo "make test                 lint and run the tests (ARGS='-k plan' to choose)"
	@echo "make test-releases        the tests marked release with vLLM $(RELEASES), in an environment of its own; in make test"
	@echo "make lint                 ruff: lint and format check"
	@echo "make setup                only build .venv ($(VARIANT) lock); the others do it by themselves"
	@echo "make peers-llmcompressor  build .venv-llmcompressor, for the checkpoints that another tool writes"
	@echo "make peers-llamacpp       build llama.cpp in .llamacpp, to compare servers with (needs CMake)"
	@echo "make clean                delete the environments, caches and demo/"

setup:
	@test -f $(LOCK) || { echo "VARIANT=$(VARIANT) has no lock $(LOCK); give cpu or cuda" >&2; exit 2; }
	@command -v "$(PYTHON)" >/dev/null || { echo "no Python at PYTHON='$(PYTHON)': install Python 3.11 or give its path" >&2; exit 2; }
	@"$(PYTHON)" requirements/setup_venv.py .venv $(LOCK) $(ALIAS) --project .

demo: setup
	$(PY) -m benchmarks.demo --out demo $(ARGS)

test: lint
	$(PY) -m pytest -q -ra --durations=15 $(ARGS)
ifeq ($(VARIANT)$(ARGS),cpu)
	@$(MAKE) --no-print-directory test-releases
endif

# The tests marked `release`, in an environment of its own for each release that is supported beside the locked one.
test-releases: $(addprefix test-release-,$(RELEASES))
test-release-%:
	@"$(PYTHON)" requirements/setup_venv.py .venv-vllm-$* $(LOCK) $(ALIAS) --release $* --project .
	.venv-vllm-$*/bin/python -m pytest -q -ra -m release tests/test_plugin_*.py

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

peers-llmcompressor:
	@"$(PYTHON)" requirements/setup_venv.py .venv-llmcompressor benchmarks/peers/llmcompressor-py311.lock

# Built for the processor of this machine, as its users build it. The converter is a script of the same source.
peers-llamacpp: .llamacpp/build/bin/llama-server
.llamacpp/build/bin/llama-server: benchmarks/peers/llamacpp.txt | setup
	rm -rf .llamacpp
	$(PY) -m pip download -q --no-deps --no-binary :all: --require-hashes -r $< -d .llamacpp
	tar -xzf .llamacpp/*.tar.gz -C .llamacpp --strip-components=1
	cmake -S .llamacpp/vendor/llama.cpp -B .llamacpp/build -DCMAKE_BUILD_TYPE=Release -DLLAMA_OPENSSL=OFF \
	    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
	cmake --build .llamacpp/build --target llama-server llama-quantize --parallel

clean:
	rm -rf .venv .venv.old .venv-vllm-* .venv-llmcompressor .llamacpp .bench demo build dist *.egg-info requirements/vllm-alias/build requirements/vllm-alias/*.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
