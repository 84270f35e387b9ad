# `make quickstart` and `make test` need nothing but Python 3.11, 3.12 or 3.13 with its venv module, and a package index.
# PYTHON=python3.12 picks an interpreter; TORCH=cpu|cuda a build of torch (by default cuda where there is a GPU), and
# TORCH_CPU_INDEX where the CPU-only build is; PIP_ARGS reaches every `pip install`; TEST_PROCESSES tests run at a time;
# CHAOS_FAULTS faults are played by `make test-chaos`; BASE is the image that `make image` starts from.
SHELL := /bin/bash
PYTHON ?=
TORCH ?= $(if $(or $(wildcard /dev/nvidia0),$(shell command -v nvidia-smi)),cuda,cpu)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP_ARGS ?=
TEST_PROCESSES ?= 2
CHAOS_FAULTS ?= 60
BASE ?= nvidia/cuda:13.0.1-devel-ubuntu24.04
VENV := .venv
NEMO := .venv-nemo
ENVIRONMENTS := .venv-environments
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --disable-pip-version-check $(PIP_ARGS)
INSTALL := $(BIN)/python $(PIP_INSTALL) -c $(VENV)/constraints.txt
# The lock's versions, for pip: any package index serves, and pip's own settings apply.
LOCKED := $(BIN)/uv export -q --frozen --no-hashes --no-header --no-annotate --no-emit-project --no-default-groups
EXTRAS := dev bench tasks alfworld $(if $(filter cuda,$(TORCH)),gpu engine)
CODE := icrl_megatron kernels recipes tests tools

.DEFAULT_GOAL := help
.PHONY: help install install-dev install-gpu install-alfworld install-engine install-environments install-nemo quickstart \
	system-packages cluster-packages test test-python check-pythons test-chaos test-engine test-cluster lint format bench \
	reproduce-small reproduce-agents gpu-bundle image clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.made:
	@python="$$(bash tools/find_python.sh $(PYTHON))" && set -x && "$$python" -m venv $(VENV)
	@touch $@

$(BIN)/uv: $(VENV)/.made
	@$(BIN)/python $(PIP_INSTALL) -q 'uv>=0.9'

# One mark for each choice of torch: another choice installs again.
$(VENV)/.torch-$(TORCH): $(BIN)/uv uv.lock
	@$(LOCKED) --group $(TORCH) $(EXTRAS:%=--extra %) -o $(VENV)/constraints.txt
	@[ $(TORCH) = cuda ] || bash tools/install_torch.sh $(BIN)/python $(VENV)/constraints.txt $(TORCH_CPU_INDEX) $(PIP_ARGS)
	@rm -f $(VENV)/.torch-* && touch $@

$(VENV)/.installed: $(VENV)/.torch-$(TORCH) pyproject.toml
	@echo "installing into $(VENV) (some minutes; 2 GB, with CUDA 6)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the development tools"
	$(INSTALL) -e '.[dev]'
	@$(INSTALL) -q -e '.[tasks]' || echo "note: reasoning-gym was not installed (a part of it needs a C compiler); its tests \
	will be skipped"
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	@echo "installing what the benchmarks compare with"
	$(INSTALL) -e '.[bench]'
	@touch $@

$(VENV)/.installed-alfworld: $(VENV)/.installed-dev
	@echo "installing ALFWorld, which compiles a planner (2 minutes)"
	@$(INSTALL) -q -e '.[alfworld]' && touch $@ || echo "note: ALFWorld was not installed (it needs cmake and a C++ \
	compiler); its tests will be skipped"

$(ENVIRONMENTS)/.installed: $(VENV)/.installed-dev $(wildcard tests/environments/*)
	@echo "installing verifiers and OpenEnv, for their tests, into $(ENVIRONMENTS) (a minute, 240 MB)"
	@bash tests/environments/install.sh $(BIN)/python $(ENVIRONMENTS) $(PIP_ARGS) && touch $@ || echo "note: verifiers \
	and OpenEnv were not installed; their tests will be skipped"

install: $(VENV)/.installed ## Make .venv and install icrl-megatron into it

install-dev: $(VENV)/.installed-dev

install-alfworld: $(VENV)/.installed-alfworld ## Add ALFWorld's games (needs cmake and a C++ compiler)

# Transformer Engine's torch extension is compiled here, against the headers of cuDNN and NCCL that come with torch. Its build
# must see the installed torch, so it is not isolated.
install-gpu: $(VENV)/.installed ## Add Transformer Engine (compiles; needs CUDA 13's nvcc) and SGLang, on a machine with GPUs
	@[ $(TORCH) = cuda ] || { echo "error: no GPU is seen here (nvidia-smi): make install-gpu TORCH=cuda" >&2; exit 2; }
	$(INSTALL) 'setuptools>=77' wheel packaging ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" NVTE_PYTORCH_FORCE_BUILD=TRUE CPATH="$$(echo $(CURDIR)/$(VENV)/lib/python3*/site-packages/nvidia/*/include \
	| tr ' ' ':')" $(INSTALL) --no-build-isolation -e '.[gpu]'
	$(INSTALL) -e '.[gpu,engine]'

quickstart: $(VENV)/.installed ## Train a tiny model with ICRL on this machine and show what it learned
	$(BIN)/icrl train quickstart

test: $(VENV)/.installed-dev $(ENVIRONMENTS)/.installed ## Run every test that runs on this machine
	$(BIN)/python -m pytest -q --ignore=tests/cluster --ignore=tests/chaos -n $(TEST_PROCESSES) --dist loadfile \
	--no-loadscope-reorder

# Another Python beside the usual one: make test-python PYTHON=python3.12 VENV=.venv-3.12
test-python: $(VENV)/.installed-dev ## Run the tests of what depends on Megatron-Core's version
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile tests/cpu/test_actor.py tests/cpu/test_weights.py \
	tests/cpu/test_checkpoint.py tests/cpu/test_platform.py tests/dist/test_grids.py

check-pythons: $(BIN)/uv ## Check what needs no torch on Python 3.12 and 3.13, where they are installed
	@for version in 3.12 3.13; do bash tools/check_python.sh $$version $(BIN)/uv $(PIP_ARGS) || exit; done

test-chaos: $(VENV)/.installed-dev ## Play seeded faults (kills, full disks, damaged files) over a small run
	ICRL_CHAOS_FAULTS=$(CHAOS_FAULTS) $(BIN)/python -m pytest -q -m chaos tests/chaos -n $(TEST_PROCESSES) --dist load

# NeMo-Run's own dependencies conflict with the tested versions, and training never imports it: a venv of its own, which
# holds the launcher and no torch.
$(NEMO)/.installed: $(BIN)/uv uv.lock pyproject.toml
	@echo "installing NeMo-Run into $(NEMO)"
	$(BIN)/python -m venv $(NEMO)
	$(LOCKED) --only-group nemo -o $(NEMO)/requirements.txt
	$(NEMO)/bin/python $(PIP_INSTALL) --no-deps -r $(NEMO)/requirements.txt
	$(NEMO)/bin/python $(PIP_INSTALL) --no-deps -e .
	@touch $@

install-environments: $(ENVIRONMENTS)/.installed ## Make .venv-environments with verifiers, OpenEnv and environments

install-nemo: $(NEMO)/.installed ## Make .venv-nemo with NeMo-Run, for icrl launch

cluster-packages: ## Install what the cluster tests need of Debian, as root: Slurm, MariaDB, munge
	bash tests/debian.sh "the cluster tests" \
	"slurmctld slurmd slurmdbd sbatch munged mariadbd curl" \
	"slurm-wlm slurm-client slurmdbd mariadb-server munge curl"

test-cluster: $(VENV)/.installed-dev $(NEMO)/.installed cluster-packages ## Start a small Slurm here and run real jobs on it
	test ! -s $(VENV)/.engine-python || export ICRL_ENGINE_PYTHON="$$(cat $(VENV)/.engine-python)"; \
	timeout --signal=INT --kill-after=60 1500 $(BIN)/python -m pytest -q tests/cluster

system-packages: ## Install what some tests need of Debian, as root: bubblewrap, Chromium, an SSH server
	bash tests/debian.sh "tests of sandbox, page and tunnel" "bwrap chromium sshd rsync" \
	"bubblewrap chromium openssh-server rsync"

install-engine: $(VENV)/.installed-dev ## Make the environment that runs the real SGLang on a CPU
	@$(BIN)/python tests/engine/environment.py > $(VENV)/.engine-python.new && \
	mv $(VENV)/.engine-python.new $(VENV)/.engine-python || { echo "skipped: make test-engine"; rm -f $(VENV)/.engine-python*; }

test-engine: install-engine ## Run the tests against a real SGLang server, in an environment of its own
	@test ! -s $(VENV)/.engine-python || ICRL_ENGINE_PYTHON="$$(cat $(VENV)/.engine-python)" \
	$(BIN)/python -m pytest -q tests/engine -n $(TEST_PROCESSES) --dist loadfile

lint: $(VENV)/.installed-dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## Put the code into the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench ## Run every benchmark that can run here, and say which bars are missed
	$(BIN)/python tools/bench.py

reproduce-small: $(VENV)/.installed ## ICRL, its ablations and GRPO over five seeds (three took 34 minutes on 2 cores)
	$(BIN)/python tools/reproduce_small.py

reproduce-agents: $(VENV)/.installed ## What tools, distillation and RL contribute on Archive, over three seeds
	$(BIN)/python tools/reproduce_agents.py

gpu-bundle: $(VENV)/.installed ## Pack what a GPU machine without a network needs (needs python3.12; compiles for 25 minutes)
	$(BIN)/python tools/gpu_bundle.py

image: ## Build the container image icrl-megatron for GPUs with docker, from BASE (docs/CLUSTER.md)
	docker build -f docker/Dockerfile --build-arg BASE=$(BASE) -t icrl-megatron .

clean: ## Remove caches and build products, not .venv and not runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
