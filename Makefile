# Development tasks; `make help` lists them. `make demo` and `make test` set everything up on a fresh machine with
# Python >= 3.10 and g++.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# Pinned, so that a machine without a GPU gets the CPU build its package index offers, and not gigabytes of CUDA.
TORCH ?= torch==2.13.0
# The releases of everything else; empty for the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
VENV := .venv
DOCS := .venv-docs
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What the demo needs is in the environment of everything else too.
ENOUGH := $(or $(wildcard $(STAMP)),$(VENV)/.demo)
COMPILE = @$(BIN)/python setup.py -q build_ext --inplace
RESULTS ?= build/bench.json
# `make bench-prefill` has a file of its own: it times whole models.
BENCHES ?= $(filter-out bench/bench_prefill.py,$(wildcard bench/bench_*.py))
SAVE ?= bench/results/cpu.json
CSRC = $(shell find csrc emulator tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

# Names of the environment that change the build or the installation reach the recipes as they are.
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test bench bench-prefill retention hub weights readme build cuda-table triton-table lint format sanitize \
        docs coverage check-abi check-triton check-transformers check-vllm check-newest lock timing wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=$(PYTHON) TORCH=$(TORCH) ARGS= (more arguments for demo, test and bench)"

demo: $(ENOUGH)  ## ask a small vision-language model with all visual tokens and with few, by every method
	$(COMPILE)
	$(BIN)/python -m tokenprune_kernels demo $(ARGS)

test: build  ## run the tests, those of the CUDA kernels on the host emulator
	@if command -v $${CXX:-g++} >/dev/null; then $(BIN)/python -m emulator; fi
	$(BIN)/python -m pytest $(ARGS)

bench: build  ## run the microbenchmarks and print the table of ratios
	@mkdir -p $(dir $(RESULTS))
	env -u TOKENPRUNE_POISON $(BIN)/python -m pytest -q -c pyproject.toml -p no:hypothesispytest -p no:cacheprovider \
	  --benchmark-json=$(RESULTS) --benchmark-columns=min,median,rounds $(BENCHES) $(ARGS)
	$(BIN)/python -m bench.report $(RESULTS) --save $(SAVE) --command "make $(MAKECMDGOALS)"

bench-prefill: BENCHES = bench/bench_prefill.py
bench-prefill: SAVE = bench/results/prefill.json
bench-prefill: bench  ## time the prefill of a small vision-language model with and without pruning

retention: build  ## how much accuracy every method keeps: studies/results/retention.json and docs/retention.md (20 minutes)
	$(BIN)/python -m studies.retention $(ARGS)

hub: $(STAMP)  ## write the package in the kernel hub's form, for CPUs: build/hub (ARGS=--cuda: with CUDA kernels)
	$(BIN)/python -m scripts.hub $(ARGS)

weights: build  ## train the small model again, from nothing (70 minutes on two cores; stopped, it goes on where it was)
	$(BIN)/python -m studies.vqa.train --out studies/models/tiny-llava-vqa $(ARGS)

readme: build  ## fill the generated tables of README.md and docs, and draw docs/figures, from the last `make bench`
	$(BIN)/python -m scripts.update_readme
	$(BIN)/python -m scripts.figures

docs: $(DOCS)/.installed  ## build the documentation site into build/site, from an environment of its own (.venv-docs)
	$(DOCS)/bin/python -m mkdocs build $(ARGS)

build: $(STAMP)  ## compile what changed in csrc/, in place
	$(COMPILE)

# The table of all architectures, from a build for all of them, as .ci/run makes it.
cuda-table: export TORCH_CUDA_ARCH_LIST = 8.0;8.6;8.9;9.0a;10.0;12.0+PTX
cuda-table: build  ## write what the CUDA kernels take and cost: tests/cuda/*.csv, and the predictions of docs/kernels.md
	$(BIN)/python -m scripts.cuda_resources --write
	$(BIN)/python -m scripts.cuda_costs --write
	$(BIN)/python -m bench.gpu_suite.predictions --write

triton-table: build  ## write tests/triton/resources.csv: what the Triton kernels take on GPUs that are not here
	$(BIN)/python -m scripts.triton_resources --write

lint: $(STAMP)  ## ruff, mypy, clang-format, and a build in which warnings are errors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)
	TOKENPRUNE_WERROR=1 $(BIN)/python setup.py -q build_ext $(WERROR_FOLDER)

# A build of its own, so that switching between `make lint` and `make test` does not compile everything again.
WERROR_FOLDER = $(if $(filter 1,$(TOKENPRUNE_WERROR)),--inplace,--build-temp build/lint --build-lib build/lint)

format: $(STAMP)  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

coverage: build  ## run the tests of the CUDA kernels and list what they left without execution
	$(BIN)/python -m scripts.kernel_coverage --clear
	$(BIN)/python -m pytest -q --ignore=tests/package/test_build.py -k "emulator or cuda" $(ARGS)
	$(BIN)/python -m scripts.kernel_coverage

sanitize: $(STAMP)  ## run the tests under AddressSanitizer (and UndefinedBehaviorSanitizer), the emulated kernels too
	PYTHON=$(abspath $(BIN)/python) bash scripts/sanitize.sh

wheel: $(STAMP)  ## build the wheels, for CPUs and with CUDA kernels, into dist/, and try each (ARGS=cpu: that one)
	$(BIN)/python -m scripts.wheel $(ARGS)

check-abi: $(STAMP)  ## load one wheel in the oldest and the newest torch (downloads gigabytes)
	$(BIN)/python -m scripts.check_abi $(ARGS)

check-triton: build  ## the Triton kernels under every supported release of Triton (ARGS=--all: every test and specialisation)
	$(BIN)/python -m scripts.check_triton $(ARGS)

check-transformers: build  ## run the integration's tests with the oldest, a middle and the newest transformers (downloads)
	$(BIN)/python -m scripts.check_transformers $(ARGS)

check-vllm: build  ## the vLLM plug-in in the engine, offline and over HTTP (.venv-vllm; downloads; ARGS=--write: docs/vllm.md)
	$(BIN)/python -m scripts.check_vllm $(ARGS)

check-newest:  ## the tests of what moves, with the newest releases, whatever the ranges say (.venv-newest; downloads)
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" CONSTRAINTS= bash scripts/setup.sh .venv-newest
	.venv-newest/bin/python -m scripts.check_newest $(ARGS)

lock: $(STAMP)  ## write constraints.txt anew: the newest releases that the ranges of pyproject.toml allow
	$(BIN)/python -m pip install -q -e '.[lock]' --no-build-isolation
	$(BIN)/python -m scripts.lock

timing:  ## how long `make demo` and `make test` take from nothing, part by part (ARGS=demo: that one)
	$(PYTHON) scripts/timing.py $(ARGS)

clean:  ## remove everything that was built or installed here
	rm -rf $(VENV) $(DOCS) .venv-newest .venv-vllm build dist *.egg-info tokenprune_kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(VENV)/.demo: EXTRAS = demo
$(STAMP) $(VENV)/.demo: pyproject.toml setup.py scripts/setup.sh $(CONSTRAINTS)
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" CONSTRAINTS="$(CONSTRAINTS)" bash scripts/setup.sh $(VENV) $(EXTRAS)
	@touch $@

$(DOCS)/.installed: pyproject.toml scripts/extra.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python scripts/extra.py docs | $(DOCS)/bin/python -m pip install -q --no-compile -r /dev/stdin $(CONSTRAINTS:%=-c %)
	@touch $@
