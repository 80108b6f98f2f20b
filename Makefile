# Each target does all of its set-up first. On a fresh machine: Python 3.11 or newer, make, a few minutes and 8 GB.
PYTHON ?= python3
KPU_VENV ?= .venv
PYTEST_ARGS ?= -n auto -m "not slow"

BIN := $(KPU_VENV)/bin
STAMP := $(KPU_VENV)/.installed
DEMO := build/demo

.PHONY: install demo test test-slow check format docs bench clean

install: $(STAMP)

# The stamp is made last: an install that was interrupted is done again.
$(STAMP): pyproject.toml constraints.txt docker/install.sh
	PYTHON="$(PYTHON)" bash docker/install.sh "$(KPU_VENV)"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo/write_digits.py $(DEMO)/digits
	$(BIN)/kpu-cache extract -c examples/demo/demo.yaml
	$(BIN)/kpu-cache status $(DEMO)/digits.kpu
	$(BIN)/kpu-cache info $(DEMO)/digits.kpu
	$(BIN)/kpu-cache verify $(DEMO)/digits.kpu
	$(BIN)/python examples/demo/look.py $(DEMO)/digits.kpu
	rm -rf $(DEMO)/student $(DEMO)/exported
	$(BIN)/kpu-train fit -c examples/demo/train.yaml -o $(DEMO)/student
	$(BIN)/kpu-train eval $(DEMO)/student
	$(BIN)/kpu-train export $(DEMO)/student -o $(DEMO)/exported
	$(BIN)/python examples/demo/use.py $(DEMO)/exported $(DEMO)/digits

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Ruff and mypy run as the pre-commit hooks do, on the versions of this environment.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docker/check_install.py

bench: $(STAMP)
	$(BIN)/python benchmarks/extract.py

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
