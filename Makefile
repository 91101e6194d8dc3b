PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
PEERS := .venv-peers
# glibc keeps freed memory: a training step on a CPU asks for the same blocks again
QUICK := OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=1000000000

unexport PYTHONDONTWRITEBYTECODE # some images set it, and then each of hundreds of processes compiles its packages again

.PHONY: help demo demo-stop evidence test test-slow test-cluster test-report lint types env env-demo env-peers efficiency
.PHONY: bench-ingest bench-ingest-remote bench-ingest-full bench-units bench-memory bench-start bench-loader bench-decode bench-load bench-access bench-attention bench-step bench-train bench-checkpoint bench-inference bench-cache bench-interruptions cache-scores bench-gpu checkpoint-variants

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

demo: ## environment, own local Ray cluster, the complete flow on easy-VQA images, report; run again, it continues
	@started=$$(date +%s); $(MAKE) --no-print-directory env-demo && VOCO_ENVIRONMENT_S=$$(( $$(date +%s) - started )) $(RUN) -m voco.demo

evidence: env-demo ## the long recipe behind docs/results.md, hours; SEEDS="0 1 2", DATA=folder of GroceryStoreDataset; run again, it continues
	@$(RUN) -m voco.demo.evidence --seeds $(or $(SEEDS),0) $(if $(DATA),--data $(DATA))

demo-stop: env-demo ## stop the demo's Ray cluster, and nothing else
	@$(RUN) -m voco.demo.cluster stop

test: env ## every test that needs only one machine, without the long proofs
	$(QUICK) $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not cluster and not browser"

test-slow: env ## long proofs in many processes: a flow under kills, resumed training, the cut of a batch, ZeRO-3, a teacher, a package from outside
	$(QUICK) $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "slow and not cluster and not browser"

test-cluster: env env-peers ## tests with S3, two nodes without a shared directory, random kills and the real autoscaler
	$(QUICK) $(RUN) -m pytest -m cluster

test-report: env ## tests of the report in headless Chromium; skipped, with a reason, where it is not on PATH
	$(QUICK) $(RUN) -m pytest -m browser -rs

bench-ingest: env env-peers ## files to Parquet: ours and a plain loop, daft, Ray Data, datasets and img2dataset
	$(RUN) bench/ingest.py
	PYTHONPATH=platform:. $(RUN) bench/ingest_s3.py

bench-ingest-remote: env ## the part of bench-ingest with media in S3: ours and the earlier build, 30 ms a request and 90 MB/s a stream
	PYTHONPATH=platform:. $(RUN) bench/ingest_s3.py

bench-ingest-full: env ## 665,298 rows with the real mix of sources and faults: rows per second, the driver's memory, every row accounted for
	$(RUN) bench/ingest_full.py

bench-units: env ## a unit of a long work list on S3, ours and the earlier build's; counting and reading the records of 200,000 units
	$(RUN) bench/units.py

bench-start: env ## opening samples/, features/ and frame caches in S3: bytes, requests and memory, ours and the earlier build's
	OMP_NUM_THREADS=1 PYTHONPATH=platform $(RUN) bench/start.py

bench-memory: env ## the driver's peak memory at a quarter and at all of the rows, of every stage that lists rows
	$(RUN) bench/driver_memory.py

bench-loader: env env-peers ## Parquet to batches of pixels: ours and LLaVA's transform, the codec alone and other loaders
	$(RUN) bench/loader.py

bench-decode: env ## frames of videos: ours, decord and PyAV in order, which of them are right, and the time at 8 and 100 frames
	OMP_NUM_THREADS=1 PYTHONPATH=platform:tests $(RUN) bench/decode.py

bench-attention: env ## one layer under the VoCo mask: causal segments and a dense mask, FlexAttention and plain causal
	OMP_NUM_THREADS=1 PYTHONPATH=platform $(RUN) bench/attention.py

bench-step: env ## a training step: packed, in segments; beside transformers with a 4D mask; from storage with 30 ms; with the live tower
	OMP_NUM_THREADS=1 PYTHONPATH=platform:tests $(RUN) bench/step.py --latency 30 --live --demo

bench-train: env ## a training on Ray Train beside a bare DeepSpeed loop over the same batches, equal losses
	$(RUN) bench/train.py

bench-checkpoint: env ## a save of a training: seconds that it blocks, bytes, loading; beside the earlier build's
	OMP_NUM_THREADS=1 $(RUN) bench/checkpoint.py

bench-load: env ## host memory while a model of 297 million weights loads on four workers, ours and the earlier build's
	OMP_NUM_THREADS=1 $(RUN) bench/load_memory.py

bench-access: env ## training's reads and tokenised conversations over what it uses, at 8 and 64 workers, beside the earlier build's
	PYTHONPATH=platform $(RUN) bench/access.py

bench-inference: env ## first token and decoding after VoCo caches, compared with no cache and a full cache
	OMP_NUM_THREADS=1 PYTHONPATH=platform $(RUN) bench/inference.py

bench-cache: env ## frame caches: a unit over its forward passes, files against torch.load and torch.save, a training step against recomputing
	OMP_NUM_THREADS=1 PYTHONPATH=platform $(RUN) bench/cache.py

bench-interruptions: env ## seconds that a training loses when a worker, its driver or a node dies, a node is drained, or one joins
	$(RUN) bench/interruptions.py

cache-scores: env ## a finished demo's video checkpoint, answering from caches in bf16, int8 and fp8: score and bytes of each
	$(RUN) bench/cache_scores.py

bench-gpu: ## 7B shapes in bf16: kernels, step, live tower, MFU, first token, decoding, frames a second; without a GPU a small shape
	PYTHONPATH=platform $${GPU_PYTHON:-$(RUN)} bench/gpu.py

checkpoint-variants: env ## tiny LLaVAs as other people save them: each equal to transformers, or refused with its line
	OMP_NUM_THREADS=1 PYTHONPATH=platform:tests $(RUN) bench/checkpoint_variants.py

efficiency: env ## the paper's efficiency table by counting: storage and operations at 7B, 13B and 34B
	PYTHONPATH=platform $(RUN) -m voco.model.efficiency

lint: env ## ruff: rules and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check --line-length 130 .

types: env ## strict type check of platform/voco
	$(RUN) -m mypy

env: $(READY) ## the virtual environment, rebuilt when its pins change

env-demo: $(READY)-demo ## the same without what only tests and linters need; `make env` adds it

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) cluster/environment.py $@ -c constraints.txt -e ".[demo,dev,fast]"

$(READY)-demo: pyproject.toml constraints.txt
	@$(PYTHON) cluster/environment.py $@ -c constraints.txt -e ".[demo,fast]"

env-peers: $(PEERS)/.ready ## a separate environment with the software that the benchmarks compare ours with

$(PEERS)/.ready: bench/peers.txt
	@$(PYTHON) cluster/environment.py $@ -r bench/peers.txt
