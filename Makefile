# Everything runs in .venv, which these targets make.   make install | demo | test | test-all | native-sanitize | native-tiles | lint
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test test-all native-sanitize native-tiles lint clean

install: .venv/.installed

.venv/.installed: pyproject.toml $(wildcard native/CMakeLists.txt native/src/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@$(BIN)/lineshaft kernels
	@touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	@touch $@

demo: .venv/.installed
	$(BIN)/lineshaft run recipes/quickstart.yaml

test: .venv/.installed-test
	$(BIN)/python -m pytest -n auto -m 'not slow'

test-all: .venv/.installed-test
	$(BIN)/python -m pytest -n auto

native-sanitize: .venv/.installed-test
	PYTHON=$(BIN)/python native/tests/sanitize.sh

native-tiles: .venv/.installed-test
	PYTHON=$(BIN)/python native/tests/soft_tiles.sh

lint: .venv/.installed-test
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .lineshaft build dist native/build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
