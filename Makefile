PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
PEERS := .venv-peers

.PHONY: help demo demo-stop test test-cluster test-report bench-ingest bench-loader lint types env env-peers

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: ## environment, own local Ray cluster, the whole flow on real data, report; again: continues, or says it is done
	@started=$$(date +%s); $(MAKE) --no-print-directory env && VOCO_ENVIRONMENT_S=$$(( $$(date +%s) - started )) $(RUN) -m voco.demo

demo-stop: env ## end the demo's Ray cluster, and nothing else
	@$(RUN) -m voco.demo.cluster stop

test: env ## every test that needs one machine and one Ray
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not cluster and not browser"

test-cluster: env env-peers ## S3 and two nodes without a shared directory, random kills, the real autoscaler
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m cluster

test-report: env ## the report in headless Chromium; skipped with a reason where it is not on PATH
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m browser -rs

bench-ingest: env env-peers ## files to Parquet: ours beside a plain loop, daft, Ray Data, datasets and img2dataset
	$(RUN) bench/ingest.py

bench-loader: env env-peers ## Parquet to batches of pixels: ours beside LLaVA's transform, the codec alone and other loaders
	$(RUN) bench/loader.py

lint: env ## ruff: rules and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check --line-length 130 .

types: env ## strict type check of platform/voco
	$(RUN) -m mypy

env: $(READY) ## the virtual environment, made again when its pins change

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev,fast]"
	@touch $@

env-peers: $(PEERS)/.ready ## an environment of their own for what the benches run beside ours

$(PEERS)/.ready: bench/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r bench/peers.txt
	@touch $@
