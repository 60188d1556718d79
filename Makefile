# `make demo` and `make test` set up what they need. PYTHON names the interpreter to
# build the environment with, STACK the releases in it (maintained or legacy, see
# cenet_mmdet/utils/stacks.py), VENV its folder.
PYTHON ?= python3
STACK ?= maintained
VENV ?= .venv$(if $(filter-out maintained,$(STACK)),-$(STACK))
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-core test-gpu test-networks lint clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## create or complete the virtual environment (10 to 30 minutes if mmcv must be compiled)
	@$(PYTHON) tools/dev/setup_env.py --stack $(STACK) --venv $(VENV)

demo: setup  ## train, evaluate and draw on a small generated set (under 10 minutes on 2 CPU cores)
	$(RUN) tools/demo.py

# Files of tests side by side, with one thread each: much of the time is imports. Those that
# kill runs at given moments come by themselves.
test: setup  ## run the test suite
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --ignore tests/engine/test_distributed.py
	$(RUN) -m pytest tests/engine/test_distributed.py

test-long: setup  ## run what takes minutes: killed runs, mixed precision, properties on 18,000 examples
	$(RUN) -m pytest -m long -s
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/layers/test_properties.py --hypothesis-profile long \
		--hypothesis-show-statistics

# The layers need torch alone, and an older Python than the stacks; TORCH is pip's.
CORE = .venv-core-$(notdir $(PYTHON))
TORCH ?= torch numpy
test-core:  ## test the layers alone: make test-core PYTHON=python3.9 TORCH='torch==2.1.2 numpy<2'
	$(PYTHON) -m venv $(CORE)
	$(CORE)/bin/python -m pip install $(foreach name,$(TORCH),'$(name)') pytest hypothesis
	$(CORE)/bin/python -m pip install --no-deps --editable .
	$(CORE)/bin/python -m pytest tests/layers

test-gpu: setup  ## test and measure on a GPU, into build/gpu_report.md; does nothing without one
	$(RUN) tools/dev/gpu_report.py build/gpu_report.md

NETWORKS ?= .venv-networks
test-networks:  ## put CE into networks of timm and torchvision and fold them; writes docs/networks.md
	$(PYTHON) -m venv $(NETWORKS)
	$(NETWORKS)/bin/python -m pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 numpy
	$(NETWORKS)/bin/python -m pip install --no-deps --editable .
	OMP_NUM_THREADS=1 $(NETWORKS)/bin/python -W ignore tools/dev/try_networks.py

lint: setup  ## check style and annotations
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:  ## delete what the commands above left behind, except data/
	rm -rf .venv .venv-* build work_dirs *.egg-info .pytest_cache .ruff_cache .hypothesis
