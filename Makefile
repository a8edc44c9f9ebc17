# Every target does its own set-up. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?= runs/demo/$(shell date +%Y-%m-%d_%H-%M-%S)
DEMO := $(DEMO)
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check pins

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## Make .venv with the pinned versions and the package, editable

demo: $(READY) ## Draw pairs, train on them and predict held-out drawings (under three minutes on two cores)
	$(BIN)/python train.py run_dir=$(DEMO)
	$(BIN)/python predict.py ckpt=$(DEMO) images=$(DEMO)/held_out/images prompts=$(DEMO)/held_out/prompts.csv out=$(DEMO)/held_out/predictions.parquet

test: $(READY) ## Run the default tests, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY) ## Run the tests marked slow: encoders of true size
	$(BIN)/python -m pytest -m slow

check: $(READY) ## Lint, format, types and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

pins: ## Renew requirements.txt from pyproject.toml (needs uv)
	uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-header --no-annotate \
		--no-emit-index-url --upgrade pyproject.toml -o requirements.txt

# uv when it is there, plain pip when not. The stamp is written last: an interrupted set-up is done again.
$(READY): requirements.txt pyproject.toml
	@if command -v uv >/dev/null 2>&1; then \
		[ -x $(BIN)/python ] || uv venv --quiet --python "$$(command -v $(PYTHON))" $(VENV); \
		uv pip install --python $(BIN)/python --compile-bytecode -r requirements.txt && \
		uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .; \
	else \
		[ -x $(BIN)/pip ] || $(PYTHON) -m venv --clear $(VENV); \
		$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt && \
		$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	fi
	@touch $@
