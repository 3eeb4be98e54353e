# make demo    train and compare on the built-in world, report in runs/demo/report.html
# make test    the test suite
# make check   lint, format, types, layers
# make docs    the documents and the API reference as pages, in site/
#
# PYTHON=python3.12     another interpreter (3.11 or newer)
# TORCH_INDEX=URL       where to take torch from, e.g. PyTorch's page of CPU builds (see README)
# PIP_FLAGS="..."       anything else for pip, e.g. --find-links wheels/
# OUT=runs/demo         where the demo writes

PYTHON ?= python3
TORCH_INDEX ?=
PIP_FLAGS ?=
OUT ?= runs/demo

VENV := .venv
BIN := $(VENV)/bin
# --no-compile: compiling every file of every package takes longer than importing the ones that are used.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile $(PIP_FLAGS)

.PHONY: demo test check docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/diptych demo --out $(OUT)

# Bytecode is kept whatever the environment says: to compile all modules anew takes each process 15 seconds.
test: $(VENV)/installed-dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Strict: a broken link, a page outside the navigation or a name that is gone is an error.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site

# Stamp files: the environment is made once, and again only when what it is made from changes.
$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Diptych needs Python 3.11 or newer, and '$(PYTHON)' is not: install one and say, e.g., make PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch alone and first: only it comes from TORCH_INDEX, what it needs comes with the rest. PyPI's torch for Linux is the
# build for NVIDIA cards and pulls gigabytes of CUDA libraries, which a machine without such a card can save itself.
$(VENV)/torch: $(VENV)/created constraints.txt
	@if [ -z "$(TORCH_INDEX)" ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  echo "No NVIDIA card seen: if pip now downloads gigabytes of CUDA, set TORCH_INDEX to PyTorch's CPU builds (README)."; fi
	$(PIP) --no-deps --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed-dev
	$(PIP) --constraint constraints.txt --editable '.[docs]'
	@touch $@
