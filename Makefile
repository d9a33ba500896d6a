# make demo   a 16K-token prompt through a trained model, dense and sparse
# make test   lint, types and the CPU tests
# make soak   10,000 drawn cases of every selector's invariants (SOAK=... another number), some ten minutes
# make docs   the documentation as a site, in build/site
# All build .venv first; PYTHON=... chooses the interpreter.

# torch.compile looks for $CXX, then for g++ alone.
ifeq ($(origin CXX),default)
CXX := $(if $(shell command -v g++),g++,$(if $(shell command -v clang++),clang++))
endif
ifneq ($(CXX),)
export CXX
endif

# Processes that run the tests; each holds torch and compiles kernels.
WORKERS ?= 2
SOAK ?= 10000

.PHONY: demo test soak docs lint setup clean

demo: setup
	.venv/bin/flexprefill demo

test: lint
	.venv/bin/pytest -m 'not gpu' -n $(WORKERS) --dist worksteal

soak: setup
	SOAK=$(SOAK) .venv/bin/pytest tests/test_soak.py -n $(WORKERS)

docs: setup
	.venv/bin/mkdocs build --strict

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

setup:
	@scripts/setup.sh

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
