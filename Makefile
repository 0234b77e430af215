# Two commands do everything: `make demo` and `make test`.  Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help venv demo test lint soak mutants protos clean

help:
	@echo "make demo    run a training job, kill a node, watch it go on"
	@echo "make test    lint, types, layers, tests (one seed per kind)"
	@echo "make soak    the full counts (long)"
	@echo "make mutants break our own code on purpose, 20 times (long)"
	@echo "make protos  generate ckptd/v1 from proto/"

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: venv
	$(BIN)/ckptd demo

test: lint
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/protos.py --check

soak: lint
	$(BIN)/python -m pytest --soak --timeout 3600

mutants: venv
	$(BIN)/python tools/mutants.py

protos: venv
	$(BIN)/python tools/protos.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
