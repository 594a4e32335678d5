# make demo    the whole pipeline, small, on this machine's CPU        make test    the tests
# Both set up .venv first, once. Needs Python 3.11 or newer, make and a C compiler; nothing else.
# On a machine without a GPU, PyTorch's CPU index saves gigabytes:
#     make test TORCH_INDEX=https://download.pytorch.org/whl/cpu

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
SOURCES := ksub_ds preprocessing experiments benchmarks docs tests

# What every command below runs with. The environment's own bin comes first: `deepspeed` starts `python`.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# DeepSpeed's default cache is shared by all environments of a user, which then rebuild each other's operators.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.venv/torch_extensions
# mpirun refuses to run as root, as containers do, unless both are set.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export TOKENIZERS_PARALLELISM := false
export OMP_NUM_THREADS ?= 1
# Processes that the tests are divided over: one for each core (nproc would answer OMP_NUM_THREADS, where it is set).
JOBS ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)
ifeq ($(shell nvidia-smi -L 2>/dev/null | head -n 1),)
export DS_ACCELERATOR ?= cpu
endif

.PHONY: help install demo test test-long lint format bench docs clean test-cluster test-chaos

help:
	@echo 'make demo     train, resume, export and query a small 15-language model under demo/'
	@echo '              [DATA=folder of <lang>.jsonl.gz  TOKENIZER=sentencepiece .model or folder]'
	@echo 'make test     the tests, but for the long ones [KSUB_DATA=folder with real data  ARGS="-k masking"  JOBS=2]'
	@echo 'make test-long     those that train for long, or try many cases: an engine on several ranks, kernels interpreted'
	@echo 'make test-cluster  three hosts as namespaces, with ssh, pdsh, MPI and SLURM: needs root and docs/cluster.md'"'"'s packages'
	@echo 'make test-chaos    20 kills at random moments; the weights must be those of a run left alone'
	@echo 'make lint     ruff check, ruff format --check, mypy'
	@echo 'make format   let ruff rewrite the files'
	@echo 'make bench    of benchmarks/: loss, step, batches, clustering, langid, corpus, finetune and engine'
	@echo 'make docs     the API pages, from the docstrings, in build/docs'
	@echo 'make install  .venv only (the others do it when needed) [TORCH_INDEX=url  PYTHON=python3.12]'
	@echo 'make clean    remove caches and demo/; .venv stays'

# Made once, and again when one of these files changes.
.venv/.installed: setup.cfg pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'error: no Python 3.11 or newer on the PATH; name one: make PYTHON=/path/to/python'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -e '.[cpu,interop,test]' -c constraints.txt
	@$(BIN)/python -m pip install --quiet kenlm -c constraints.txt \
		|| echo 'note: kenlm did not build (it needs a C++ compiler); the perplexity test will be skipped'
	@touch $@

install: .venv/.installed

demo: .venv/.installed
	$(BIN)/python experiments/demo/run.py --out demo $(if $(DATA),--data '$(DATA)') $(if $(TOKENIZER),--tokenizer '$(TOKENIZER)')

# HF_HUB_OFFLINE: no test may reach for the network. -rs: a skipped test says why. A process takes whole files, so that
# what a file's tests share is made once.
PYTEST = HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest -rs --durations=10 -n $(JOBS) --dist loadfile

test: .venv/.installed
	$(PYTEST) -m 'not long' $(ARGS)

test-long: .venv/.installed
	$(PYTEST) -m long $(ARGS)

# Not part of `make test`: they need root, and packages that docs/cluster.md names. Without them they skip, and say why.
test-cluster: .venv/.installed
	KSUB_CLUSTER=1 $(BIN)/python -m pytest -rs --durations=10 tests/cluster $(ARGS)

test-chaos: .venv/.installed
	KSUB_CLUSTER=1 KSUB_CHAOS_KILLS=20 $(BIN)/python -m pytest -rs -s tests/cluster/test_chaos.py $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: .venv/.installed
	@set -e; for file in loss step batches clustering langid corpus finetune engine; do echo "== $$file"; $(BIN)/python benchmarks/$$file.py; done
	$(BIN)/python benchmarks/step.py --objective clm

docs: .venv/.installed
	$(BIN)/python -m pip install --quiet -e '.[docs]' -c constraints.txt
	$(BIN)/python docs/build_api.py --out build/docs

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
