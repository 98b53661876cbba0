# Every verb is one line of the README; `make help` lists them.
PYTHON ?= python3
PORT ?= 8000
# This machine alone, as in docker-compose.yml: PUBLISH=0.0.0.0 lets others in.
PUBLISH ?= $(or $(DETECTOR_HOST),127.0.0.1)
# The GPU build of the runtime comes only where an NVIDIA driver answers.
DEVICE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
# Everything but the service takes it only where asked to, beside the usual environment: make export DEVICE=gpu.
GPU := $(if $(filter command,$(origin DEVICE)),$(filter -gpu,-$(DEVICE)))
SERVE := .venv-serve/bin/python
DEV := .venv$(GPU)/bin/python
INSTALL = -m pip install --quiet --disable-pip-version-check --require-hashes

.DEFAULT_GOAL := help
.PHONY: help serve coco test test-slow test-image test-ray test-full-size train export bench soak screenshots lint format up requirements

help:  ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | column -t -s '|'

serve: .venv-serve/.$(DEVICE)  ## serve the bundled demo model on port 8000 (PORT=..., PUBLISH=0.0.0.0)
	DETECTOR_HOST=$(PUBLISH) DETECTOR_PORT=$(PORT) $(SERVE) -m service

coco: model_repository/coco/1/model.onnx .venv-serve/.$(DEVICE)  ## torchvision's fastest detector of the 80 COCO classes: fetch, export, serve
	DETECTOR_MODEL=coco DETECTOR_HOST=$(PUBLISH) DETECTOR_PORT=$(PORT) $(SERVE) -m service

# Without a network: make coco ARGS="--weights FILE". A version 2 of a better network (--name coco) is served in its place.
model_repository/coco/1/model.onnx: | .venv$(GPU)/.ready
	$(DEV) -m export torchvision:fasterrcnn_mobilenet_v3_large_320_fpn --name coco --version 1 $(ARGS)

test: .venv$(GPU)/.ready  ## the tests that CI runs
	$(DEV) -m ruff check . && $(DEV) -m ruff format --check . && $(DEV) -m mypy && OMP_NUM_THREADS=1 $(DEV) -m pytest

test-slow: .venv$(GPU)/.ready  ## the proofs that take minutes
	$(DEV) -m pytest -m "slow and not gpu"

test-image: .venv$(GPU)/.ready  ## build and start every image without Docker (20 minutes, 30 GB; root; Debian's buildah, debootstrap, bubblewrap)
	$(DEV) -m pytest -m slow tests/test_deploy_image.py

test-ray: .venv-ray/.ready  ## two replicas under Ray Serve, one of them killed under load
	.venv-ray/bin/python -m pytest -m slow tests/test_deploy_ray.py

test-full-size: .venv$(GPU)/.ready  ## export every network at its own size, one after the other (hours; one: ARGS="-k resnet50_c4")
	FULL_SIZE=1 OMP_NUM_THREADS=1 $(DEV) -m pytest -m slow tests/test_export_full_size.py $(ARGS)

train: .venv$(GPU)/.ready  ## train on your data: make train ARGS="--preset mobilenet_v2_fpn --data FOLDER --out runs/mine"
	$(DEV) -m model.train $(ARGS)

export: .venv$(GPU)/.ready  ## checkpoint to a served version: make export ARGS="runs/mine/best.pt --name mine" (bf16, engines: DEVICE=gpu)
	$(DEV) -m export $(ARGS)

bench: .venv$(GPU)/.ready  ## our service beside other servers on one simulated device (needs requirements/bench.txt for the peers)
	$(DEV) -m benchmarks.serving $(ARGS)

soak: .venv$(GPU)/.ready  ## good, bad, slow and vanishing clients with reloads for SOAK_MINUTES (30)
	$(DEV) -m benchmarks.soak --json benchmarks/results/soak.json --plot benchmarks/results/soak.png

screenshots: .venv$(GPU)/.ready  ## take the pictures of the README anew
	$(DEV) docs/screenshots.py

lint: .venv$(GPU)/.ready  ## ruff and mypy
	$(DEV) -m ruff check . && $(DEV) -m ruff format --check . && $(DEV) -m mypy

format: .venv$(GPU)/.ready  ## rewrite the sources as ruff likes them
	$(DEV) -m ruff format . && $(DEV) -m ruff check --fix .

up:  ## service, Prometheus and Grafana in containers
	docker compose up --build

requirements: .venv$(GPU)/.ready  ## compile requirements/*.txt anew from pyproject.toml
	$(PYTHON) requirements/compile.py

.venv-serve/.$(DEVICE): requirements/$(DEVICE).txt
	$(PYTHON) -m venv .venv-serve
	$(SERVE) $(INSTALL) -r $<
	touch $@

.venv$(GPU)/.ready: requirements/dev$(GPU).txt
	$(PYTHON) -m venv .venv$(GPU)
	$(DEV) $(INSTALL) -r $<
	touch $@

.venv-ray/.ready: requirements/test-ray.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python $(INSTALL) -r $<
	touch $@
