# `make` lists the targets. Everything runs from a fresh clone: each target installs what it needs first.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PYTHON := $(VENV)/bin/python
UV := $(VENV)/bin/uv
UV_VERSION := 0.13.9
SOURCES := operator trainer_image dev tests bench
# Which tests run beside which: tests/conftest.py.
PARALLEL := --numprocesses=auto --dist=loadscope --no-loadscope-reorder
LLAMA_CPP := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/qlora-operator/llama.cpp
APT := DEBIAN_FRONTEND=noninteractive apt-get -y -o DPkg::Lock::Timeout=600 --no-install-recommends
export PYTHONPATH := dev
export PYTHONUNBUFFERED := 1
# Where it's set, each of the processes of a test run would compile the same modules again.
unexport PYTHONDONTWRITEBYTECODE
# Another cluster is touched only where it is named on the command line, never because a shell happens to point at it.
ifneq ($(origin KUBECONFIG),command line)
unexport KUBECONFIG
endif

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-14s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.installed ## Make .venv with every dependency and the qlora command

$(VENV)/.installed: requirements/dev.txt pyproject.toml
	@echo "==> Installing the Python environment into $(VENV) (about 5 GB the first time)"
	test -x $(PYTHON) || python3.11 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet uv==$(UV_VERSION)
	$(UV) pip install --quiet --compile-bytecode --python $(PYTHON) --requirement requirements/dev.txt
	$(UV) pip install --quiet --python $(PYTHON) --no-deps --editable .
	@mkdir -p $(VENV)/share/llama.cpp # the local cluster's pods mount it, filled or not (make llama-cpp)
	@touch $@

.PHONY: cluster-up
cluster-up: setup ## Start the local Kubernetes, S3, Prometheus and the operator; needs root on Debian
	$(PYTHON) -m cluster up
	@$(PYTHON) -m compileall -q operator trainer_image # for the pods, which mount them and can't write
	$(PYTHON) -m demo install
	.cluster/bin/kubectl --kubeconfig .cluster/kubeconfig get nodes

.PHONY: cluster-down
cluster-down: ## Stop the local cluster and leave nothing behind
	@if [ -x $(PYTHON) ]; then $(PYTHON) -m cluster down; else PYTHONPATH=dev python3.11 -m cluster down; fi

.PHONY: demo
ifeq ($(origin KUBECONFIG),command line)
demo: setup ## Fine-tune SmolLM2 on a real cluster into S3 (KUBECONFIG=... for your own)
	$(PYTHON) -m demo install
	$(PYTHON) -m demo run
else
demo: cluster-up
	$(PYTHON) -m demo run
endif

.PHONY: test
test: cluster-up browser llama-cpp ## Run every test a CPU machine can run, on the real local cluster too
	$(PYTHON) -m pytest $(PARALLEL)

.PHONY: test-unit
test-unit: setup browser llama-cpp ## Run the tests that need no cluster
	$(PYTHON) -m pytest $(PARALLEL) tests/unit tests/golden

.PHONY: test-chaos
test-chaos: cluster-up ## Break the local cluster and its S3 in every way that docs/reliability.md lists
	$(PYTHON) -m pytest tests/handlers/test_lost_watch.py tests/unit/trainer/test_resume.py -m long
	$(PYTHON) -m pytest tests/chaos -m ''

.PHONY: fuzz
fuzz: cluster-tools ## Look for manifests and histories that break a promise, thousands of them
	$(PYTHON) -m pytest tests/handlers/test_schema_agreement.py tests/unit/operator/test_histories.py -m long

.PHONY: browser
browser: ## Install Chromium, which tests look at the report with; needs root on Debian
	@command -v chromium chromium-browser google-chrome > /dev/null || { $(APT) update && $(APT) install chromium; }

.PHONY: llama-cpp
llama-cpp: setup ## Build llama.cpp's tools for GGUF exports into .venv; the first time takes minutes
	@command -v cmake > /dev/null && command -v c++ > /dev/null || { $(APT) update && $(APT) install cmake g++; }
	trainer_image/llama-cpp.sh $(LLAMA_CPP) $(PYTHON) llama-debug
	@cmp -s $(LLAMA_CPP)/VERSION $(VENV)/share/llama.cpp/VERSION || { \
	  rm -rf $(VENV)/share/llama.cpp.new && cp -r $(LLAMA_CPP) $(VENV)/share/llama.cpp.new && \
	  rm -rf $(VENV)/share/llama.cpp && mv $(VENV)/share/llama.cpp.new $(VENV)/share/llama.cpp; }

.PHONY: verify
verify: setup cluster-tools ## Check format, lint, types, import contracts, generated files, chart and metrics
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/mypy
	PYTHONPATH=operator:trainer_image $(VENV)/bin/lint-imports
	$(PYTHON) -m qlorajob.crd --check
	.cluster/bin/helm lint --strict charts/qlora-operator
	$(PYTHON) dev/metric_rules.py

.PHONY: cluster-tools
cluster-tools: setup
	@$(PYTHON) -m cluster tools

.PHONY: format
format: setup ## Format and fix what can be fixed
	$(VENV)/bin/ruff format $(SOURCES)
	$(VENV)/bin/ruff check --fix $(SOURCES)

.PHONY: generate
generate: setup ## Make crds/, the chart's copy and the reference from the models
	$(PYTHON) -m qlorajob.crd

.PHONY: lock
lock: setup ## Pin requirements/*.txt anew from requirements/*.in
	$(UV) pip compile --quiet --python-version 3.11 --no-header --no-annotate --no-emit-index-url requirements/dev.in -o requirements/dev.txt
	for set in operator trainer; do \
	  $(UV) pip compile --quiet --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	    requirements/$$set.in -c requirements/dev.txt -o requirements/$$set.txt; done
	cp requirements/trainer.txt requirements/unsloth.txt  # what is pinned in there stays
	$(UV) pip compile --quiet --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	  requirements/unsloth.in --override requirements/unsloth-overrides.txt -o requirements/unsloth.txt

.PHONY: images
images: setup ## Build the operator and trainer images with buildah and load them into the local cluster
	$(PYTHON) -m cluster images

.PHONY: clean
clean: cluster-down ## Remove everything that was built here
	rm -rf $(VENV) .cluster build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
