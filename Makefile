# Every target makes .venv first where it is missing. See README.md.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/nafld.yaml

.PHONY: help demo test lint ui bench clean

help:
	@echo "make demo   install, run the main job on real data, print the table (CONFIG=$(CONFIG))"
	@echo "make test   install, run the whole test suite"
	@echo "make ui     open the MLflow UI on the recorded runs"
	@echo "make lint   ruff format and rules, mypy"
	@echo "make bench  the benchmarks, with their ratios"
	@echo "make clean  remove .venv, data/, reports/ and everything in mlruns/"

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	touch $@

demo: .venv/.installed
	$(BIN)/ehr-sn run $(CONFIG)

test: .venv/.installed
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

ui: .venv/.installed
	$(BIN)/ehr-sn ui

bench: .venv/.installed
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/ingest.py
	$(BIN)/python benchmarks/recommender.py
	$(BIN)/python benchmarks/autoencoder.py

clean:
	rm -rf .venv data reports mlruns/*
