# make demo: install and build the embedded default.  make test: the tests.  make help: the rest.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do command -v $$p >/dev/null && \
	$$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test coverage check bench soak docs clean help

demo: $(INSTALLED)  ## install, prune the embedded digit classifier, show before and after
	$(BIN)/cswap-deploy build recipes/quickstart.yaml

test: $(INSTALLED)  ## the tests (20 to 30 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

coverage: $(INSTALLED)  ## the tests, and which lines of the package they do not reach
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term-missing:skip-covered

check: $(INSTALLED)  ## format, lint, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

bench: $(INSTALLED)  ## the benchmarks; they write JSON beside themselves
	$(BIN)/python benchmarks/oneshot.py --net quickstart --methods ours,peers --seeds 0 --cuts 0.6,0.5,0.4
	test -f runs/quickstart/bundle/model.onnx || $(BIN)/cswap-deploy build recipes/quickstart.yaml
	$(BIN)/python benchmarks/measuring.py runs/quickstart/bundle/model.onnx

soak: $(INSTALLED)  ## the long tests, and 60 builds killed at random moments (one to two hours)
	$(BIN)/python -m pytest -m slow
	$(BIN)/python tests/soak.py --builds 60

docs: $(INSTALLED)  ## regenerate what is generated under docs/
	$(BIN)/python docs/generate_recipe.py

clean:  ## remove the environment, runs and caches
	rm -rf $(VENV) runs dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/ -/'

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer with venv is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[host,dev]"
	touch $@
