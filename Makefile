# Two commands matter: `make demo` and `make test`. Both set up .venv first.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_WORKERS ?= 2

.PHONY: demo test lint format gpu-test bench notebooks wheel-test clean setup

setup: $(STAMP)

# tools/find_python runs each candidate: a pyenv shim can exist and still fail.
$(STAMP): pyproject.toml tools/find_python
	@python="$$(sh tools/find_python)" || exit 1; \
	echo "using $$python"; \
	"$$python" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/jaxeff demo $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder -m "not gpu and not network" $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# On a GPU machine name the interpreter that has a CUDA build of jax: make gpu-test PYTHON=python3
PYTHON ?= $(BIN)/python
ifeq ($(PYTHON),$(BIN)/python)
PYTHON_READY := $(STAMP)
endif

gpu-test: $(PYTHON_READY)
	$(PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

bench: $(PYTHON_READY)
	$(PYTHON) -m experiments.benchmarks.attention $(BENCH_ARGS)

notebooks: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[notebooks]'
	$(BIN)/python tools/run_notebooks.py notebooks

# Builds the wheel, installs it in an empty environment, runs the README program outside the checkout.
wheel-test: $(STAMP)
	$(BIN)/python tools/wheel_test.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
