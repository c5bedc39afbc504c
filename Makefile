# One command list, the same here and in CI. `make demo` and `make test` are the two to know.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SERVE  ?=

.PHONY: demo serve test setup model fmt lint types imports tests lock clean

setup: $(VENV)/.ready

# torch comes first and by plain pip: resolved with the rest it would pull the whole CUDA set
# into the lock. The lock is pinned and hashed, and names no registry.
$(VENV)/.ready: requirements/dev.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Freight needs Python 3.11 or newer; PYTHON=/path/to/python3.11 make ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@
