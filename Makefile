# Everything runs from .venv, which is built from requirements.txt when it is missing.
PYTHON ?= python3
PY := .venv/bin/python
# Waiting threads are to sleep soon: on a busy machine, spinning makes small steps ten times as slow.
export GOMP_SPINCOUNT ?= 1000

help:            ## this list
	@awk -F ':.*## *' '/^[a-z]+:.*##/ {printf "  make %-7s %s\n", $$1, $$2}' Makefile

train: .venv/made   ## train the default run into runs/default, or go on with it
	$(PY) train.py $(if $(wildcard runs/default),--resume)

probe: .venv/made   ## cluster and score the captures of runs/default
	$(PY) probe.py runs/default $(if $(wildcard runs/shuffled/probe.jsonl),--beside runs/shuffled)

control: .venv/made  ## train and probe runs/shuffled, whose instructions get random tasks; then make probe
	$(PY) train.py --shuffle-tasks --out runs/shuffled $(if $(wildcard runs/shuffled),--resume)
	$(PY) probe.py runs/shuffled

quick: .venv/made   ## train and probe a small run, in seconds
	$(PY) train.py --preset quick $(if $(wildcard runs/quick),--resume)
	$(PY) probe.py runs/quick

facts: .venv/made   ## train and probe runs/facts: English instructions about real facts
	$(PY) train.py --preset facts $(if $(wildcard runs/facts),--resume)
	$(PY) probe.py runs/facts

apply: .venv/made   ## what clusters are good for: pre-training and alignment, three seeds each
	$(PY) apply.py pretrain
	$(PY) apply.py align

TOLD_TASKS = $(wildcard runs/pretrain/seed*/task_id)
figures: .venv/draws ## draw what the above have left in runs/ (installs matplotlib)
	for found in $(wildcard runs/*/probe.jsonl runs/*/apply.jsonl); do \
		$(PY) plot.py $$(dirname $$found) || exit; done
	$(if $(TOLD_TASKS),$(PY) plot.py $(TOLD_TASKS) --out runs/pretrain/task_id)

test: .venv/made    ## run the tests
	$(PY) -m pytest -q test_all.py

clean:           ## remove .venv, caches and the runs made by this file
	rm -rf .venv .pytest_cache .hypothesis __pycache__ \
		runs/default runs/quick runs/shuffled runs/facts runs/pretrain runs/align

.venv/made: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/draws: .venv/made
	$(PY) -m pip install --quiet matplotlib==3.11.2
	touch $@

.DEFAULT_GOAL := help
.PHONY: help train probe control quick facts apply figures test clean
