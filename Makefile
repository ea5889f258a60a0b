# Needs: python3 >= 3.11 (with venv), a C++17 compiler, make. Everything else goes into $(VENV).
#   make demo    install and run the demonstration (a report in demo/)
#   make test    install, check format, lint and types, run all tests
#   make lint    the checks alone
#   make clean   remove what the other targets made

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= demo

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := $(shell find openmm_diffforce cpp -type f \
             \( -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
             -o -name '*.txt' -o -name '*.pdb' -o -name '*.html' -o -name '*.j2' \))
CXX_FILES = $(shell find cpp -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.c' -o -name '*.cu' -o -name '*.cuh' \))

.PHONY: help demo test lint pytest clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

# Stamps: an install is repeated only when pyproject.toml or a source file is newer.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "openmm_diffforce needs Python 3.11 or newer; $(PYTHON) is" \
	       "`$(PYTHON) --version 2>&1`. Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "python3 -m venv failed: install your system's python3-venv package." >&2; exit 1; }
	@touch $@

$(VENV)/.installed: pyproject.toml $(SOURCES) | $(VENV)/.made
	@echo "Installing openmm_diffforce into $(VENV) (PyTorch and its libraries: about 3 GB, once)."
	$(PIP) '.[torchforce]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) '.[torchforce,test]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/diffforce demo --out $(OUT)
	@echo "Report: $(abspath $(OUT)/report.html)"

test: lint pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run --Werror $(CXX_FILES))

# --pyargs: the doctests of the installed package, not of the tree (which has no compiled library).
pytest: $(VENV)/.installed-test
	$(BIN)/pytest tests/ --pyargs openmm_diffforce

clean:
	rm -rf $(VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
