# Each target makes its own environment in .venv first; a repeat is instant while pyproject.toml and constraints.txt are unchanged.
# Another interpreter: make demo PYTHON=python3.12
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MOTO := $(VENV)/moto/.installed

export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help setup demo serve stop doctor test chaos lint format
.DEFAULT_GOAL := help

help:
	@echo "make setup   the environment in .venv, and nothing else"
	@echo "make demo    eight experts, router, serving and the measured table, on this machine; continues where it was cut off"
	@echo "make serve   the demo's model behind http://127.0.0.1:8000, in the background"
	@echo "make stop    ends what make demo or make serve left running"
	@echo "make doctor  whether this machine is as it should be, and what to do where it is not"
	@echo "make test    all tests"
	@echo "make chaos   trainings killed in every way at random moments, and what else takes many minutes to show"
	@echo "make lint    ruff and mypy"
	@echo "make format  ruff's own layout"

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python found: install 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), but 3.11, 3.12 or 3.13 is needed; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "$(VENV) was made with another Python; delete it and run this again" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@# Compiled once: Ray starts a process for each worker, and every one imports torch.
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[demo,dev]'
	@touch $@

# The tests' S3 server wants an older dateutil than the pins, so it has an environment of its own.
$(MOTO): $(STAMP) tests/stores/moto.txt
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)/moto
	$(BIN)/uv pip install --quiet --python $(VENV)/moto/bin/python -r tests/stores/moto.txt
	@touch $@

setup: $(STAMP)

# exec: the demo's parent is then make itself, and it notices when make is killed.
demo: $(STAMP)
	@exec $(BIN)/python -m jobs.demo --end-with-parent $$PPID

serve: $(STAMP)
	@exec $(BIN)/python -m jobs.serve

# No environment, nothing of ours can be running.
stop:
	@test ! -x $(BIN)/python || exec $(BIN)/python -m jobs.serve --stop

# A cluster, or a run: make doctor ARGS="--config runs/mine/config.yaml --address http://head:8265"
doctor: $(STAMP)
	@exec $(BIN)/python -m jobs.doctor $(ARGS)

test: $(STAMP) $(MOTO)
	@exec $(BIN)/python -m pytest

# Each test prints the seed of its moments; CHAOS_SEED=N brings them back.
chaos: $(STAMP) $(MOTO)
	@exec $(BIN)/python -m pytest -s -m chaos

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
