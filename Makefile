PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test quality lint clean

help:
	@echo "make demo    set up what is missing, then serve a small model and show what pruning saves"
	@echo "make test    set up what is missing, then check style and types and run the tests"
	@echo "make quality set up what is missing, then measure accuracy with and without pruning and"
	@echo "             update the pages; half an hour on two cores, goes on where it stopped"
	@echo "             (ARGS=\"-n 100 --out FOLDER\" passes arguments on)"
	@echo "make setup   build .venv only (PYTHON=python3.12 names another interpreter)"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove .venv and caches"

setup:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) is not installed; Python 3.11 or newer is needed"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version);" \
	    "name another one: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) tools/setup.py

demo: setup
	$(BIN)/tokenprune demo

test: lint
	$(BIN)/pytest

quality: setup
	$(BIN)/python -m bench.quality $(ARGS)
	$(BIN)/python -m bench.publish

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p tokenprune

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
