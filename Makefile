# A fresh machine needs Python (3.10 or later) with venv and pip, and make: every target sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers
COMPARED := $(VENV)/.compared

.PHONY: help demo test lint docs bench compare clean

help:
	@echo "make demo   solve and train on real data, write pictures and numbers to runs/demo"
	@echo "make test   run the tests"
	@echo "make lint   check the style of the code"
	@echo "make docs   build the documentation into docs/_build/html"
	@echo "make bench  install the peers and run the benchmarks beside them (an hour)"
	@echo "make compare  install the field's estimators and losses, and compare numbers with theirs"

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a minute or two, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/contrastive demo --out runs/demo

# two processes of one thread: the threads of two BLAS on two cores spin while they wait for each other
test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check iotsolve contrastive tests docs

docs: $(READY)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

$(PEERS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $(PEERS)

bench: $(PEERS)
	$(BIN)/python -m tests.benchmarks --docs

# lightly and open_clip come without what they ask for: torchvision has no build for a bare CPU, and their losses need none of it
$(COMPARED): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[compare]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps lightly open_clip_torch
	@touch $(COMPARED)

compare: $(COMPARED)
	$(BIN)/python -m pytest tests/comparisons
	$(BIN)/python -m tests.benchmarks.contrastive --docs

clean:
	rm -rf docs/_build build dist *.egg-info .pytest_cache .ruff_cache
