# Every command of the project. `make` alone lists them; the first one that needs it sets up .venv by itself.

PYTHON ?= python3
PRESET ?= smoke
ROOT   := $(if $(value ROOT),$(value ROOT),runs/$(PRESET))
TORCH  ?= $(if $(wildcard /dev/nvidia0),cuda,cpu)

# Modules are compiled once, when they are first imported; without this every Ray worker would compile them again.
unexport PYTHONDONTWRITEBYTECODE

BIN        := .venv/bin
READY      := .venv/.ready
READY_DEV  := .venv/.ready-dev
READY_CLUSTER := .venv/.ready-cluster
UNFINISHED := .venv/.unfinished
LOCK       := .venv-lock

# On Linux, PyPI's torch brings several GB of CUDA; the CPU build lives on an index of its own (`+cpu` sorts above the
# plain version). Where that index cannot be reached pip goes on with the others: one look-up, no retries.
TORCH_INDEX := $(if $(filter cpu,$(TORCH)),--retries 0 --extra-index-url https://download.pytorch.org/whl/cpu)
# Byte code is written when a module is first imported: compiling all of it beforehand takes half a minute longer.
INSTALL     := -m pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt
BENCHMARKS   = $(filter-out __init__ browser captioner chains counting harness page_rules pages photo_server processes rivals stand_ins tiny_clip,$(basename $(notdir $(wildcard benchmarks/*.py))))

# The value of a variable as one word for the shell, whatever it holds.
quoted = '$(subst ','\'',$(value $(1)))'

# What runs on the cluster's head instead of here; the checkout goes along.
SUBMIT = $(BIN)/ray job submit --address $(call quoted,CLUSTER) --working-dir . --runtime-env clusters/runtime_env.yaml \
    --submission-id cogview-$(call quoted,PRESET)-$(shell date +%Y%m%d-%H%M%S) --

# What is missing is said before anything is set up.
ifneq ($(filter generate generate-coglm,$(MAKECMDGOALS)),)
  $(if $(value PROMPT)$(value PROMPTS),,$(error say what to draw: make generate PROMPT="a large red circle on a blue background"))
endif
ifneq ($(filter caption,$(MAKECMDGOALS)),)
  $(if $(value IMAGES),,$(error say which pictures: make caption IMAGES=/folder))
endif
ifneq ($(filter complete,$(MAKECMDGOALS)),)
  $(if $(value IMAGE)$(value REQUESTS),,$(error say what to complete: make complete IMAGE=/photo.jpg BOX="0.2 0.3 0.7 0.8" PROMPT="a large red circle"))
endif
ifneq ($(filter verify,$(MAKECMDGOALS)),)
  $(if $(filter $(NAME),$(BENCHMARKS)),,$(error NAME=$(NAME) is none of: $(BENCHMARKS)))
endif

.DEFAULT_GOAL := help
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*\#\# .*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-24s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## Set up .venv (PYTHON=python3.12, TORCH=cpu or cuda); the other commands do this by themselves

pretrain: $(if $(value CLUSTER),$(READY_CLUSTER),$(READY)) ## Web pages to pictures; your own pairs: DATA=/folder [CAPTIONS=zh,en] [PRESET=smoke] [CLUSTER=http://head:8265 ROOT=/shared/folder] [ARGS="..."]
	@$(if $(value CLUSTER),$(SUBMIT) python,$(BIN)/python) -m pipelines road $(call quoted,PRESET) $(if $(value DATA),--data $(call quoted,DATA)) \
	    $(if $(value CAPTIONS),--captions $(call quoted,CAPTIONS)) $(if $(value CLUSTER),--root $(call quoted,ROOT)) $(ARGS)

generate: $(READY) ## Draw with the model trained last: PROMPT="a large red circle on a blue background" or PROMPTS=/file [BEST=8] [LEXICON=/file.toml] [ARGS="..."]
	@$(BIN)/python -m pipelines generate smoke --root runs/$(call quoted,PRESET) \
	    $(if $(value PROMPT),--prompt $(call quoted,PROMPT)) $(if $(value PROMPTS),--prompts-file $(call quoted,PROMPTS)) \
	    $(if $(value BEST),--best --candidates $(call quoted,BEST)) \
	    $(if $(value LEXICON),--lexicon $(call quoted,LEXICON)) $(ARGS)

finetune-captioning: $(READY) ## Teach the model trained last to write captions, and to rank its pictures [PRESET=smoke] [ARGS="..."]
	@$(BIN)/python -m pipelines finetune_captioning $(call quoted,PRESET) $(ARGS)

caption: $(READY) ## Write captions in English and Chinese: IMAGES=/folder, a picture or the output of generate [PRESET=smoke] [ARGS="..."]
	@$(BIN)/python -m pipelines caption $(call quoted,PRESET) --images $(call quoted,IMAGES) $(ARGS)

finetune-style: $(READY) ## Teach it a style: DATA=/folder STYLE="oil painting" (or a folder for each style) [ARGS="..."]
	@$(BIN)/python -m pipelines finetune_style $(call quoted,PRESET) $(if $(value DATA),--data $(call quoted,DATA)) \
	    $(if $(value STYLE),--style $(call quoted,STYLE)) $(ARGS)

finetune-super-resolution: $(READY) ## Teach the model trained last to draw pictures at twice the size [PRESET=smoke] [ARGS="..."]
	@$(BIN)/python -m pipelines finetune_super_resolution $(call quoted,PRESET) $(ARGS)

super-resolve: $(READY) ## Draw pictures at twice the size: those drawn last, or SAMPLES=/folder or PICTURES=/folder [ARGS="..."]
	@$(BIN)/python -m pipelines super_resolve smoke --root runs/$(call quoted,PRESET) \
	    $(if $(value SAMPLES),--samples $(call quoted,SAMPLES)) \
	    $(if $(value PICTURES),--pictures $(call quoted,PICTURES)) $(ARGS)

finetune-direct-sr: $(READY) ## CogView2: teach the model trained last to draw three times the size at once [PRESET=smoke] [ROOT=runs/coglm_smoke] [ARGS="..."]
	@$(BIN)/python -m pipelines finetune_direct_sr $(call quoted,PRESET) --root $(call quoted,ROOT) $(ARGS)

finetune-iterative-sr: $(READY) ## CogView2: teach it to draw most of that again, in six passes [PRESET=smoke] [ROOT=runs/coglm_smoke] [ARGS="..."]
	@$(BIN)/python -m pipelines finetune_iterative_sr $(call quoted,PRESET) --root $(call quoted,ROOT) $(ARGS)

super-resolve-at-once: $(READY) ## Draw pictures at three times the size in seven calls: those drawn last, or SAMPLES=/folder or PICTURES=/folder [ROOT=...] [ARGS="..."]
	@$(BIN)/python -m pipelines super_resolve cogview2_smoke --root $(call quoted,ROOT) \
	    $(if $(value SAMPLES),--samples $(call quoted,SAMPLES)) \
	    $(if $(value PICTURES),--pictures $(call quoted,PICTURES)) $(ARGS)

complete: $(READY) ## Draw a part of a picture anew with the CogLM trained last: IMAGE=/photo.jpg BOX="0.2 0.3 0.7 0.8" PROMPT="..." or REQUESTS=/folder [ARGS="..."]
	@$(BIN)/python -m pipelines complete smoke --root runs/coglm_$(call quoted,PRESET) \
	    $(if $(value IMAGE),--image $(call quoted,IMAGE)) $(if $(value BOX),--box $(foreach share,$(BOX),'$(share)')) \
	    $(if $(value PROMPT),--prompt $(call quoted,PROMPT)) $(if $(value REQUESTS),--requests $(call quoted,REQUESTS)) $(ARGS)

serve: $(READY) ## Serve the model trained last on a web page, on 127.0.0.1 [PRESET=smoke] [ARGS="--port 8080"]
	@$(BIN)/python -m pipelines serve smoke --root runs/$(call quoted,PRESET) $(ARGS)

finetune-fashion: $(READY) ## One domain in high resolution, with a VQGAN: DATA=/folder [CAPTIONS=zh,en] [PRESET=smoke] [ARGS="..."]
	@$(BIN)/python -m pipelines road fashion_$(call quoted,PRESET) $(if $(value DATA),--data $(call quoted,DATA)) \
	    $(if $(value CAPTIONS),--captions $(call quoted,CAPTIONS)) && \
	    $(BIN)/python -m pipelines finetune_fashion $(call quoted,PRESET) --root runs/fashion_$(call quoted,PRESET) $(ARGS)

human-evaluation: $(READY) ## Let people judge pictures on a web page: those of the last run, or MODELS="NAME=/folder NAME=/other" [REFERENCES=/folder] [PRESET=smoke] [ARGS="..."]
	@$(BIN)/python -m pipelines human_evaluation smoke --root runs/$(call quoted,PRESET) \
	    $(if $(value MODELS),--models $(MODELS)) $(if $(value REFERENCES),--references $(call quoted,REFERENCES)) $(ARGS)

count-votes: $(READY) ## Count what they said: the paper's Figure 10, tables and a report [PRESET=smoke] [ARGS="--study /folder"]
	@$(BIN)/python -m pipelines count_votes smoke --root runs/$(call quoted,PRESET) $(ARGS)

pretrain-coglm: $(READY) ## CogView2's CogLM, which draws, captions and completes: DATA=/folder [CAPTIONS=zh,en] [PRESET=smoke] [ARGS="..."]
	@$(BIN)/python -m pipelines road coglm_$(call quoted,PRESET) $(if $(value DATA),--data $(call quoted,DATA)) \
	    $(if $(value CAPTIONS),--captions $(call quoted,CAPTIONS)) && \
	    $(BIN)/python -m pipelines cluster_codes $(call quoted,PRESET) --root runs/coglm_$(call quoted,PRESET) && \
	    $(BIN)/python -m pipelines pretrain_coglm $(call quoted,PRESET) --root runs/coglm_$(call quoted,PRESET) $(ARGS)

generate-coglm: $(READY) ## Draw with the CogLM trained last: PROMPT="..." or PROMPTS=/file [STYLE=oil] [PRESET=smoke] [ARGS="..."]
	@$(BIN)/python -m pipelines generate_coglm $(call quoted,PRESET) --root runs/coglm_$(call quoted,PRESET) \
	    $(if $(value PROMPT),--prompt $(call quoted,PROMPT)) $(if $(value PROMPTS),--prompts-file $(call quoted,PROMPTS)) \
	    $(if $(value STYLE),--style $(call quoted,STYLE)) $(ARGS)

import-weights: $(READY) ## Released weights to folders of ours: GPT=/folder (or COGLM=/folder) IMAGE=/file.pt TEXT=/file.model [ARGS="..."]
	@$(BIN)/python -m pipelines import_weights $(if $(value COGLM),coglm --gpt $(call quoted,COGLM),paper) \
	    $(if $(value GPT),--gpt $(call quoted,GPT)) \
	    $(if $(value IMAGE),--image-tokenizer $(call quoted,IMAGE)) \
	    $(if $(value TEXT),--text-tokenizer $(call quoted,TEXT)) $(ARGS)

compare-image-tokenizers: $(READY) ## Four ways to learn a codebook side by side, on DATA=/folder or the last run's pairs [PRESET=smoke]
	@$(if $(value DATA),$(BIN)/python -m pipelines road $(call quoted,PRESET) --root runs/tokenizers \
	    --until filter_pairs --data $(call quoted,DATA) $(if $(value CAPTIONS),--captions $(call quoted,CAPTIONS)) &&) \
	    $(BIN)/python -m pipelines compare_image_tokenizers $(call quoted,PRESET) \
	    $(if $(value DATA),--root runs/tokenizers) $(ARGS)

stress-stability: $(READY) ## Train a deep narrow GPT to its limits, with and without Sandwich-LN and PB-relax [PRESET=smoke]
	@$(BIN)/python -m pipelines stress_stability $(call quoted,PRESET) $(ARGS)

rank-candidates: $(READY) ## What the best of n candidates gains, as the paper's Figure 9 [PRESET=smoke] [ARGS="--candidates 32 --clip /folder"]
	@$(BIN)/python -m pipelines rank_candidates $(call quoted,PRESET) $(ARGS)

reproduce: $(READY) ## The paper's experiments on one page, beside the project's reference curves [PRESET=smoke] [ARGS="..."]
	@$(BIN)/python -m pipelines reproduce $(call quoted,PRESET) $(ARGS)

analyse-attention: $(READY) ## Look at the attention heads of the model trained last [PRESET=smoke] [ARGS="..."]
	@$(BIN)/python -m pipelines analyse_attention $(call quoted,PRESET) $(ARGS)

machine-evaluation: $(READY) ## Score drawn pictures by the paper's Table 1: REFERENCE=captions_val2014.json PICTURES=/val2014 [IMAGES=/folder of another system] [PRESET=smoke] [ARGS="..."]
	@$(BIN)/python -m pipelines machine_evaluation $(call quoted,PRESET) \
	    $(if $(value REFERENCE),--reference $(call quoted,REFERENCE)) \
	    $(if $(value PICTURES),--reference-pictures $(call quoted,PICTURES)) \
	    $(if $(value IMAGES),--images $(call quoted,IMAGES)) $(ARGS)

dashboard: $(READY) ## Open MLflow's pages on 127.0.0.1
	@$(BIN)/python -m pipelines dashboard $(ARGS)

doctor: $(READY) ## Check versions, memory, disks, ports, GPUs, cluster and tracker [DATA=s3://bucket/folder]
	@$(BIN)/python -m pipelines doctor $(if $(value DATA),--data $(call quoted,DATA)) $(ARGS)

status: $(READY) ## Stages, scores and paths of the chain that ran last; JSON=1 for programs
	@$(BIN)/python -m pipelines status $(if $(value JSON),--json) $(ARGS)

test: $(READY_DEV) ## Run the tests, or some of them: ARGS="tests/shards -k manifest"
	@$(BIN)/python -m pytest $(if $(value ARGS),$(ARGS),--numprocesses 2 --dist loadgroup)

lint: $(READY_DEV) ## Check style, formatting and types
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m mypy

format: $(READY_DEV) ## Put the code into the project's form
	@$(BIN)/python -m ruff check --fix
	@$(BIN)/python -m ruff format

verify: $(READY_DEV) ## Measure a promise against its bar: NAME=road (any file of benchmarks/)
	@$(BIN)/python -m benchmarks.$(NAME) $(ARGS)

bench: $(READY_DEV) ## Measure every promise and write benchmarks/results/
	@failed=; for name in $(BENCHMARKS); do \
	    $(BIN)/python -m benchmarks.$$name --save || failed="$$failed $$name"; \
	done; test -z "$$failed" || { echo "below the bar:$$failed" >&2; exit 1; }

lock: ## Take the newest versions that pyproject.toml allows into constraints.txt
	@rm -rf $(LOCK) && $(PYTHON) -m venv $(LOCK)
	@$(LOCK)/bin/python -m pip install -qq --no-compile --upgrade pip
	@$(LOCK)/bin/python -m pip install -qq --no-compile $(TORCH_INDEX) --no-deps torch
	@$(LOCK)/bin/python -m pip install -qq --no-compile '.[dev]'
	@{ sed -n '/^#/p' constraints.txt; \
	   $(LOCK)/bin/python -m pip freeze --all --exclude cogview \
	     | sed -e 's/^\(torch==[0-9.]*\).*/\1/' -e '/^\(nvidia-\|cuda-\|triton\)/d'; } > $(LOCK)/constraints.txt
	@mv $(LOCK)/constraints.txt constraints.txt && rm -rf $(LOCK)

clean: ## Remove .venv and caches; finished runs stay
	rm -rf .venv $(LOCK) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

# An interrupted set-up leaves the mark of unfinished work behind, and the next one starts from an empty folder: a package
# that was cut while being unpacked can look installed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'CogView needs Python 3.11 or newer, and $(PYTHON) is' "$$($(PYTHON) --version 2>&1 || true);" \
	         'name another one: make PYTHON=python3.12' >&2; exit 1; }
	@if test -e $(UNFINISHED); then rm -rf .venv; fi
	@echo "Setting up .venv with torch for $(TORCH)" \
	    "($(if $(wildcard /dev/nvidia0),/dev/nvidia0 is here,there is no /dev/nvidia0); TORCH=cpu or TORCH=cuda decides" \
	    "otherwise). The first time some hundred MB are downloaded." >&2
	@mkdir -p .venv && touch $(UNFINISHED)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python $(INSTALL) --upgrade pip  # a Python's own pip is often old, and takes twice as long
	@$(BIN)/python $(INSTALL) $(TORCH_INDEX) --no-deps torch
	@$(BIN)/python $(INSTALL) --editable .
	@touch $@ && rm $(UNFINISHED)

$(READY_CLUSTER): $(READY)
	@touch $(UNFINISHED)
	@$(BIN)/python $(INSTALL) --editable '.[cluster]'
	@touch $@ && rm $(UNFINISHED)

$(READY_DEV): $(READY)
	@touch $(UNFINISHED)
	@$(BIN)/python $(INSTALL) --editable '.[dev]'
	@touch $@ && rm $(UNFINISHED)
