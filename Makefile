# Every target does its own set-up: on a fresh machine `make demo` needs only Python 3.11 and make.
# The first run downloads the packages of requirements.lock into .venv; later runs start at once.

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow lint types toy-models docs-figures lock clean
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
STAMP := .venv/.installed
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## the environment in .venv, from requirements.lock
	@echo "ready: $(BIN)/shotloom"

demo: $(STAMP) ## the whole product in ten minutes; VIDEOS=folder takes your own videos
	$(BIN)/shotloom demo $(if $(VIDEOS),"videos=$(VIDEOS)")

test: $(STAMP) ## the fast tests
	$(BIN)/pytest

slow: $(STAMP) ## the heavy tests, and those that need a GPU where there is one
	$(BIN)/pytest -m "slow or gpu"

lint: $(STAMP) ## ruff: style, imports, likely bugs
	$(BIN)/ruff check .

types: $(STAMP) ## mypy over models/ and infra/
	$(BIN)/mypy

toy-models: $(STAMP) ## train the small shipped models again (hours; can be stopped and started); ARGS="steps=10000"
	$(BIN)/python -m pipelines.toy_models $(ARGS)

# METHOD/TASK of each picture
PLANS := fvdm/i2v fvdm/diagonal fvdm/long_video tic_ft/i2v_in_context lct/shot_conditioned lct/autoregressive fca/tvp aid/tvp

docs-figures: $(STAMP) ## draw the noise plans of docs/methods/ again
	mkdir -p docs/methods/plans
	for plan in $(PLANS); do \
		$(BIN)/shotloom plan $${plan%/*} $${plan#*/} --plot docs/methods/plans/$${plan%/*}-$${plan#*/}.png || exit 1; \
	done

lock: $(UV) ## requirements.lock after a change of pyproject.toml; delete it first to move every version on
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) pip compile --quiet pyproject.toml --group dev \
		--python-version 3.11 --output-file requirements.lock
	@! grep -n '://' requirements.lock || { echo "requirements.lock must hold no address"; exit 1; }

clean: ## remove environment and caches; leaves runs/ alone
	rm -rf .venv .uv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements.lock pyproject.toml | $(UV)
	@$(BIN)/python -c '' 2>/dev/null || $(UV) venv --quiet --clear --python 3.11 .venv
	$(UV) pip install --python $(BIN)/python --compile-bytecode -r requirements.lock
	$(UV) pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation -e .
	@touch $@

.uv/bin/uv:
	@echo "uv is not installed: putting it into .uv/, for this folder only"
	@for python in python3.11 python3.12 python3.13 python3 python; do \
		command -v $$python >/dev/null 2>&1 && $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue; \
		$$python -m venv .uv && .uv/bin/python -m pip install --quiet uv && exit 0; \
		rm -rf .uv; \
		echo "$$python cannot make an environment: install its venv module (Debian: apt install python3-venv) or uv"; \
		exit 1; \
	done; echo "no Python 3.11 or newer found: install it, or uv"; exit 1
