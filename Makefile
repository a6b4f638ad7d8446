# `make help` lists what there is. Every target sets itself up: see tools/setup.

PY := .venv/bin/python
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONDONTWRITEBYTECODE := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs-test bench clean

help: ## this list
	@echo "usage: make TARGET [ARGS=...]"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: ## states of a real disk: kept in a pool, brought to another cache, made into a working image
	@tools/setup demo
	@PATH="$(CURDIR)/.venv/bin:$$PATH" tools/demo $(ARGS)

test: lint ## the linters, then all tests; ARGS go to pytest, e.g. ARGS="-k names -x"
	@echo "make: pytest"
	@$(PY) -m pytest -n auto --dist worksteal $(ARGS)

lint: ## ruff (rules and format) and mypy --strict
	@tools/setup test
	@echo "make: ruff check"
	@$(PY) -m ruff check --quiet .
	@echo "make: ruff format --check"
	@$(PY) -m ruff format --check --quiet .
	@echo "make: mypy --strict"
	@$(PY) -m mypy --no-error-summary

docs-test: ## only the commands and examples in the documentation
	@tools/setup test
	@$(PY) -m pytest tests/docs $(ARGS)

bench: ## tables: this library beside cp, rsync, qemu-img and avocado-i2n, doing the same work
	@tools/setup test
	@$(PY) -m benchmarks $(ARGS)

clean: ## remove what the other targets made here, the virtual environment included
	rm -rf .venv .venv-avocado .venv-bench .guest .tox build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis docs/_build
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
