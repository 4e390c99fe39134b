# `make faults` damages files, kills and starves the commands: twenty minutes.
# `make demo` and `make test` build .venv when it is missing, with any Python >= 3.11 that is found.
# PYTHON=/path/to/python picks one.

PYTHON ?= $(shell for p in python3 python python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v "$$p"; break; }; done)
BIN := .venv/bin
# Tests start many processes; each would compile every module that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test docs faults lint clean

demo: .venv/installed
	$(BIN)/mambahome demo

test: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# What the notebooks print is kept in build/docs, and made anew for a notebook that changed.
docs: .venv/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --color -c docs/_site -d build/docs/doctrees . build/docs/html
	$(BIN)/python docs/_site/check.py build/docs/html
	$(BIN)/python docs/_site/tutorial.py
	@echo "Open build/docs/html/index.html"

faults: .venv/installed
	$(BIN)/python -m pytest -m faults tests/faults -n 2 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv was found. Install one (Debian, Ubuntu: apt install python3-venv) or pass PYTHON=/path/to/python"; exit 1; }
	@echo "Building .venv with $(PYTHON), once"
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info
