# make demo: train an encoder on the sentences in the package.   make test: the tests.
# Both make .venv first, and install into it what constraints.txt pins.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
REQUIREMENTS := pyproject.toml setup.py constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/demo.done
	$(BIN)/python -m simcse.train --output_dir runs/demo --overwrite_output_dir

test: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.done: $(REQUIREMENTS) | $(BIN)/python
	$(INSTALL) --editable ".[$*]"
	@touch $@
