# make demo          adapt a vision and a language model with TOAST, offline, in a few minutes
# make quick         run the tests that one runs while working, in less than two minutes
# make lint          check style (ruff) and types (mypy)
# make test          lint, then run all tests and measure what they cover, with the versions of constraints.txt
# make test-newest   run the tests that touch other packages, with the newest versions of these
# make test-oldest   the same with exactly the oldest versions that setup.cfg declares
# make browser       install Chromium for the tests of interactive pages, which are skipped without it (Debian, Ubuntu)
# make bench         measure what TOAST costs next to the base model and LoRA, in about twenty minutes
# make docs          build the documentation into site/; make docs-serve shows it while it is written
# make clean         remove what these have made
#
# Each sets up a virtual environment first. On Linux a plain `pip install torch` fetches several gigabytes for CUDA, so
# PyTorch's index of CPU builds is asked as well. For a GPU name the index of your CUDA version:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cu130

PYTHON ?= python3
# transformers 5.20 is the last that runs on Python 3.10, the oldest version declared: OLDEST_PYTHON=python3.10
OLDEST_PYTHON ?= $(PYTHON)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
DEMO_ARGS ?=
BENCH_ARGS ?= --models vit-small gpt2-768 llama-256 llama-768 --batch_size 2 \
    --methods $(foreach method,toast toast-lite toast-early toast-late toast-lite-early toast-lite-late,\
    $(method) $(method)-fused $(method)-stored) --output_file outputs/cost.json
# -n auto: as many processes as there are cores; who has no tests left takes some of another.
PYTEST ?= python -m pytest -n auto --dist worksteal
# `make test` counts the lines of the package that tests run, in a part of their cases (`tests/conftest.py`);
# `make test COVERAGE=` is faster.
COVERAGE ?= --cov

BIN := .venv/bin
READY := .venv/ready
QUICK_TESTS := tests/contract tests/golden -m "not slow" -k "ViT or Llama or golden"
COMPATIBILITY_TESTS := tests/contract tests/families/test_transformers.py tests/golden/test_golden.py \
    $(addprefix tests/features/test_,forward.py caches.py shared_cache.py generation.py checkpointing.py compile.py \
    saving.py peft_contract.py trainer.py threads.py errors.py mixed_precision.py wiring.py dropout.py lora.py \
    damaged_adapters.py prompt_start.py card.py explain.py explain_received.py explain_adapters.py topdown_prompt.py \
    prompt_from.py gate.py gate_fitting.py saved_gates.py feedback_scale.py pass2_lora.py pass2_adapters.py \
    pass2_targets.py output_feedback.py several_adapters.py mixed_batches.py batch_rows.py padding.py \
    variational_loss.py)

# torch comes first, so that only it is looked up in the other index. Where that index cannot be reached, pip says so
# and goes on with the usual one.
PIP_INSTALL := pip install --quiet
TORCH_INSTALL := $(PIP_INSTALL) --no-deps --timeout 15 --retries 1 --extra-index-url $(TORCH_INDEX)

.PHONY: demo quick lint test test-newest test-oldest browser bench docs docs-serve clean

demo: $(READY)
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

quick: $(READY)
	$(BIN)/$(PYTEST) $(QUICK_TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/$(PYTEST) $(COVERAGE)

test-newest: .venv-newest/ready
	.venv-newest/bin/$(PYTEST) $(COMPATIBILITY_TESTS)

test-oldest: .venv-oldest/ready
	.venv-oldest/bin/$(PYTEST) $(COMPATIBILITY_TESTS)

browser:
	{ command -v chromium && command -v chromedriver; } || { apt-get update && apt-get install -y chromium chromium-driver; }

bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python examples/benchmarks/cost.py $(BENCH_ARGS)

docs: .venv/docs
	$(BIN)/mkdocs build --strict

docs-serve: .venv/docs
	$(BIN)/mkdocs serve

clean:
	rm -rf .venv .venv-newest .venv-oldest outputs site build *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage

$(READY): constraints.txt setup.cfg pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/$(TORCH_INSTALL) --constraint constraints.txt torch
	$(BIN)/$(PIP_INSTALL) --constraint constraints.txt --editable '.[test]'
	touch $@

.venv/docs: $(READY)
	$(BIN)/$(PIP_INSTALL) --constraint constraints.txt --editable '.[docs]'
	touch $@

# Made anew each time, or it would not be the newest. Only torch keeps its version: later ones may have no CPU build.
.PHONY: .venv-newest/ready
.venv-newest/ready:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/$(TORCH_INSTALL) --constraint constraints.txt torch
	.venv-newest/bin/$(PIP_INSTALL) --upgrade --editable '.[compatibility]'
	touch $@

.venv-oldest/ready: setup.cfg pyproject.toml Makefile
	$(OLDEST_PYTHON) -m venv --clear .venv-oldest
	sed -n '/^install_requires/,/^$$/s/^ *\(.*\)>=/\1==/p' setup.cfg > .venv-oldest/constraints.txt
	.venv-oldest/bin/$(TORCH_INSTALL) --constraint .venv-oldest/constraints.txt torch
	.venv-oldest/bin/$(PIP_INSTALL) --constraint .venv-oldest/constraints.txt --editable '.[compatibility]'
	touch $@
