# make demo: train an encoder on the sentences in the package.   make test: the tests.   make docs: the site in build/site.
# Each makes .venv first, and installs into it what constraints.txt pins.
# make smoke: build the wheel and the sdist and try each in an environment of its own; PYTHON=python3.12 TORCH=torch==2.11.0 choose.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
REQUIREMENTS := pyproject.toml setup.py constraints.txt

.PHONY: demo test lint docs dist smoke clean

demo: $(VENV)/demo.done
	$(BIN)/python -m simcse.train --output_dir runs/demo --overwrite_output_dir

test: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

dist: $(VENV)/dev.done
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist .

smoke: dist
	PYTHON=$(PYTHON) .ci/smoke $(TORCH) build/dist/*

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.done: $(REQUIREMENTS) | $(BIN)/python
	$(INSTALL) --editable ".[$*]"
	@touch $@
