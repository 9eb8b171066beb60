# make demo    adapt a vision model and a language model with TOAST, offline, in a few minutes
# make test    check the style and run all tests
# make clean   remove what the two have made
#
# Both set up .venv first, with the versions of constraints.txt. On Linux a plain `pip install torch` fetches several
# gigabytes for CUDA, so PyTorch's index of CPU builds is asked as well. For a GPU name the index of your CUDA version:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cu130

PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
DEMO_ARGS ?=

BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test clean

demo: $(READY)
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

clean:
	rm -rf .venv outputs build *.egg-info .pytest_cache .ruff_cache

# torch comes first and without its dependencies, so that only it is looked up in the other index. Where that index
# cannot be reached, pip says so and goes on with the usual one.
$(READY): constraints.txt setup.cfg pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --timeout 15 --retries 1 --extra-index-url $(TORCH_INDEX) --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
