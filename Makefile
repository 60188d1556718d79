# `make demo` and `make test` set up what they need. PYTHON names the interpreter to
# build the environment with, STACK the releases in it (maintained or legacy, see
# cenet_mmdet/stacks.py), VENV its folder.
PYTHON ?= python3
STACK ?= maintained
VENV ?= .venv$(if $(filter-out maintained,$(STACK)),-$(STACK))
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long lint clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## create or complete the virtual environment (10 to 30 minutes if mmcv must be compiled)
	@$(PYTHON) tools/setup_env.py --stack $(STACK) --venv $(VENV)

demo: setup  ## train, evaluate and draw on a small generated set (under 10 minutes on 2 CPU cores)
	$(RUN) tools/demo.py

# Files of tests side by side, with one thread each: much of the time is imports. Those that
# kill runs at given moments come by themselves.
test: setup  ## run the test suite
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --ignore tests/test_distributed.py
	$(RUN) -m pytest tests/test_distributed.py

test-long: setup  ## run the tests that take minutes each: killed runs, mixed precision
	$(RUN) -m pytest -m long -s

lint: setup  ## check style
	$(VENV)/bin/ruff check .

clean:  ## delete what the commands above left behind, except data/
	rm -rf $(VENV) build work_dirs *.egg-info .pytest_cache .ruff_cache .hypothesis
