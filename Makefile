# Plain `make` lists the targets. Everything that needs Python runs in .venv, made on first use.
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Installed where there is no NVIDIA GPU; pinned, for the newest may come with gigabytes of CUDA.
CPU_TORCH ?= torch==2.13.0

# Either may be missing, or be left out by an empty TRAIN= or META=.
TRAIN ?= $(wildcard data/train.jsonl)
META ?= $(wildcard data/meta.jsonl)
OUT ?= data/shards
NUM_SHARDS ?= 8
WORKERS ?= 4
NUM_GPUS ?= 8
GPU ?= h100-80
# More flags of launch/plan.py, as --reward_model …
PLAN ?=
CONFIG ?= launch/recipes/instance_table.yaml
MODEL ?= runs/instance_table/export
TEST ?= data/test.jsonl

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-seeds test test-survive test-gpu test-web lint format shard-data train evaluate bench
.PHONY: bench-data bench-gpu plan test-wheel

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | column -t -s '|'

setup: $(STAMP) ## make .venv and install everything into it

$(STAMP): setup.py
	test -x $(PYTHON) || python3 -m venv $(VENV)
	command -v nvidia-smi >/dev/null || $(PYTHON) -m pip install --quiet "$(CPU_TORCH)"
	$(PYTHON) -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(STAMP) ## the whole job on handwritten digits, in runs/demo (some minutes)
	$(PYTHON) launch/demo.py --out runs/demo

demo-seeds: $(STAMP) ## five seeds of the demo, each with all comparisons, in runs/demo-seeds (hours)
	$(PYTHON) launch/demo.py --out runs/demo-seeds --seeds 1 2 3 4 5

test: $(STAMP) ## all tests but those that need a GPU or a browser
	$(PYTHON) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not web"

test-survive: $(STAMP) ## kill a run KILLS=20 times and change its number of ranks; survive.json
	$(PYTHON) tests/survive.py

test-wheel: $(STAMP) ## build the wheel, and train with it where no checkout is
	$(PYTHON) tests/wheel.py

test-gpu: $(STAMP) ## the tests that need a GPU
	$(PYTHON) -m pytest -m gpu

test-web: $(STAMP) ## the tests in a browser; needs chromium and npm
	npm install --silent --prefix tests/web
	$(PYTHON) -m pytest -m web

lint: $(STAMP) ## check format, style, types and spelling
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	git ls-files -z | xargs -0 $(PYTHON) -m codespell_lib

format: $(STAMP) ## put format and style right
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

SHARDED = $(if $(TRAIN),--train "$(TRAIN)") $(if $(META),--meta "$(META)") \
	$(if $(META_NUM_SHARDS),--meta_num_shards $(META_NUM_SHARDS)) $(if $(LIMIT),--limit $(LIMIT)) \
	$(if $(filter-out 0,$(DRY_RUN)),--dry_run) $(if $(filter-out 0,$(OVERWRITE)),--overwrite)
shard-data: $(STAMP) ## shard TRAIN=… and META=… into OUT=… as NUM_SHARDS=… shards with WORKERS=… (OVERWRITE=1)
	$(PYTHON) -m data_tools.shard $(strip $(SHARDED)) --out "$(OUT)" --num_shards $(NUM_SHARDS) \
		--workers $(WORKERS)

train: $(STAMP) ## train on NUM_GPUS=… with CONFIG=… on the shards in OUT=…
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" deepspeed --num_gpus $(NUM_GPUS) launch/train.py \
		--config $(CONFIG) --train_json_file "$(OUT)/train" --meta_json_file "$(OUT)/meta"

plan: $(STAMP) ## memory, time and fit of CONFIG=… on NUM_GPUS=… of type GPU=…, before it is started
	$(PYTHON) launch/plan.py --config $(CONFIG) --num_gpus $(NUM_GPUS) --gpu $(GPU) $(PLAN)

evaluate: $(STAMP) ## Best-of-N of MODEL=… on TEST=…
	$(PYTHON) launch/evaluate.py --model "$(MODEL)" --test_json_file "$(TEST)"

BENCHMARKS = estimators iteration memory collectives table best_of_n full_size
bench: $(STAMP) ## cost, exactness, traffic and memory of training and scoring, in bench.json
	rm -f bench.json
	for name in $(BENCHMARKS); do $(PYTHON) tests/benchmarks/bench_$$name.py || exit 1; done

ON_GPU = full_size iteration memory estimators
bench-gpu: $(STAMP) ## iterations at full size on a GPU, and what can be seen there, in bench_gpu.json
	rm -f bench_gpu.json
	for name in $(ON_GPU); do \
		$(PYTHON) tests/benchmarks/bench_$$name.py --device cuda --out bench_gpu.json || exit 1; done

bench-data: $(STAMP) ## sharding and loading against bare Pillow, in bench_data.json (some minutes)
	$(PYTHON) tests/benchmarks/bench_data.py
