# Sets up .venv and runs what a newcomer runs, in this folder. Runs keep tokens in ~/.cache/hft_megatron.
#
#   make install   .venv with the pinned versions (the other targets do it by themselves)
#   make demo      train, half fine-tune, fully fine-tune and compare; about ten minutes on two cores
#   make bench     measure what needs no data of yours, into runs/bench; about twenty minutes on two cores
#   make test      linters, types and the quick tests
#   make docs      the pages of docs/, as HTML in build/docs
#
# PYTHON=python3.11 chooses the interpreter; from 3.12 on the versions are those of constraints/cuda.txt. PIP_ARGS goes to
# every pip call: on Linux, PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" avoids the large CUDA build of
# torch.

PYTHON ?= python3
PIP_ARGS ?=
CONSTRAINTS := constraints/$(shell $(PYTHON) -c 'import sys; print("cpu" if sys.version_info < (3, 12) else "cuda")').txt
BIN := .venv/bin
STAMP := .venv/installed
# Two workers, each with whole files: half of the time tests wait for ranks, for hosts that are silent, or for imports.
AT_ONCE := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: help install test lint docs demo bench

help:
	@sed -n 's/^#   //p' Makefile

install: $(STAMP)
	@echo "ready: source .venv/bin/activate"

$(STAMP): setup.py constraints/cpu.txt constraints/cuda.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make: PYTHON=$(PYTHON) must be Python 3.10 or newer" >&2; exit 2; }
	@echo "installing the pinned versions into .venv: some minutes, and 2 to 6 GB"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet --constraint $(CONSTRAINTS) setuptools
	@# Without build isolation, because a build environment of pip's own would ignore the constraints.
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[dev]'
	@touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources .ci/* docker/*.sh docker/build/*.sh examples/*.sh examples/slurm/*.sbatch tools/gpu/*.sh

test: lint
	$(BIN)/python -m pytest $(AT_ONCE) -m "not slow and not system"

docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -b html -d build/doctrees docs build/docs
	@echo "the first page: build/docs/index.html"

demo: $(STAMP)
	$(BIN)/python tools/demo/run.py

# Fewer rounds than behind the committed results, which stay as they are. The last needs the project's history.
bench: $(STAMP)
	$(BIN)/python tools/bench/bill.py --pairs 1 --output runs/bench/bill.json
	$(BIN)/python tools/bench/rounds.py --output runs/bench/rounds.json
	$(BIN)/python tools/bench/packing.py --pairs 1 --output runs/bench/packing.json
	$(BIN)/python tools/bench/reference.py --rounds 1 --output runs/bench/reference.json
	$(BIN)/python tools/bench/checkpoints.py --pairs 1 --output runs/bench/checkpoints.json
	$(BIN)/python tools/bench/generate.py --pairs 3 --output runs/bench/generate.json
	$(BIN)/python tools/bench/head.py --pairs 1 --output runs/bench/head.json
	$(BIN)/python tools/bench/peers.py --rounds 3 --work 128 --work 512 --set "before and DDP" --set full --set FSDP2 \
		--output runs/bench/peers.json
