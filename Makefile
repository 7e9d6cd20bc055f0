# Every target works as the first command in a fresh clone: the environment is made when it is needed.
VENV ?= .venv
PYTHON ?= python3
DATA ?=
RUNS ?= runs

BIN := $(VENV)/bin
STAMP := $(VENV)/.ok

.DEFAULT_GOAL := help
.PHONY: help demo test lint check format reference zoo clean

help:
	@echo "make demo    train, scan, purify and report on embedded data; read demo/report.html"
	@echo "make test    the tests that need no GPU, no network and no data set"
	@echo "make lint    style, format, types, import rules (make check is the same)"
	@echo "make format  rewrite the code in the project's format"
	@echo "make reference   train the models of the earliest table: DATA=folder of CIFAR-10 parquet files, RUNS=runs"
	@echo "make zoo     train what is missing in zoo/, two models side by side: DATA=the same folder (hours)"
	@echo "make clean   remove what the other targets made, except the environment and $(RUNS)/"

# Constraints keep torch at a version for which the installed wheel is taken instead of a newer one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m unbackdoor demo

# Processes of one thread each: the tests' networks are too small for several threads to help.
# pyproject.toml asks for -q once; a second -q would hide pytest's closing line.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

reference: $(STAMP)
	@test -n "$(DATA)" || { echo "make reference needs DATA=a folder with train and test parquet files of CIFAR-10" >&2; exit 2; }
	$(BIN)/python benchmarks/reference_models.py --data "$(DATA)" --out "$(RUNS)/reference"

zoo: $(STAMP)
	@test -n "$(DATA)" || { echo "make zoo needs DATA=a folder with train and test parquet files of CIFAR-10" >&2; exit 2; }
	-$(BIN)/python benchmarks/build_zoo.py --data "$(DATA)" --out zoo --jobs 2
	$(BIN)/python benchmarks/build_zoo.py --data "$(DATA)" --out zoo --measure

clean:
	rm -rf build dist demo src/*.egg-info .coverage .hypothesis
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
