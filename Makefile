# Two commands do everything on a fresh machine with Python 3.11+ and make; either may come first.
#   make quickstart   make .venv/, run the main job on the embedded base and data, then kill a run of it and compare
#   make test         make .venv/ and run the tests
#   make quick        lint and one fast test for each promise, for the loop of a developer: under 90 s on two cores
#   make notebooks    write notebooks/*.ipynb anew, without outputs, from the texts beside them
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/quickstart
# two workers for each core, because many tests wait for processes
PYTEST := $(BIN)/python -m pytest --numprocesses $$(( $$(nproc) < 4 ? 2 * $$(nproc) : 8 )) --dist worksteal

.PHONY: quickstart test quick pytest-test pytest-quick lint notebooks clean
quickstart: .venv/installed
	$(BIN)/lora-kit train recipes/quickstart.yaml --out $(OUT)
	$(BIN)/lora-kit drill recipes/quickstart.yaml --out $(OUT)/drill --faults kill --steps 8

# lint beside the tests: mypy without its cache needs most of a minute on one core
test quick: .venv/installed
	@$(MAKE) --no-print-directory --jobs 2 lint pytest-$@

pytest-test: .venv/installed
	$(PYTEST) --durations 15

pytest-quick: .venv/installed
	$(PYTEST) -m quick $$(grep -rl 'mark\.quick' tests --include=test_*.py)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: .venv/installed
	$(BIN)/jupytext --quiet --to notebook notebooks/*.py

# torch first and exactly, so that no other package's looser range chooses it
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lora_kit needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bnb,trackers,notebook,check,metrics,plot]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache
