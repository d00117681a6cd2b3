PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/stdlib-6m.yaml
STAMP  := $(VENV)/.installed

.PHONY: help setup run test test-long lint bench clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## Create the virtual environment and install pinned packages (the other targets do it too)

$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) with pinned packages from constraints.txt (once; some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check "$$(grep -E '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)
	@echo "Ready: $(BIN)/bitgenome --help"

run: $(STAMP) ## Search the embedded model and prove the result in llama.cpp (CONFIG=... for another)
	@$(BIN)/bitgenome run $(CONFIG)

# Threads that wait for one which has no core must not spin: a calibration of two took 10 times as long beside others.
test: $(STAMP) ## All tests that need no GPU: whole runs first, in two to four processes
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n auto --maxprocesses 4 \
		--dist loadfile --no-loadscope-reorder -m "not long and not gpu"

test-long: $(STAMP) ## More minutes than continuous integration has: llama.cpp's own mixes, more kills
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -m "long and not gpu"

lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(STAMP) ## Measure encoders, evaluation and llama.cpp's own mixes on this machine
	@$(BIN)/python -m benchmarks.encoders
	@$(BIN)/python -m benchmarks.evaluation
	@$(BIN)/python -m benchmarks.llamacpp_mixes

clean: ## Remove the virtual environment (runs stay)
	@rm -rf $(VENV)
