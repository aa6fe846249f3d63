# `make demo` and `make test` do all their own set-up: the first makes the environment .venv, every later one reuses it
# and brings it up to date when setup.cfg, pyproject.toml or constraints.txt have changed.

PYTHON ?= python3
WORKERS ?= 2
# In the order of collection: files with few tests, which by default come last, are the slow ones.
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := .venv/bin/python -m pip --disable-pip-version-check

# The oldest Diffusers is the one that setup.cfg names. It wants a hub client below 2.0, and httpx.
OLDEST := diffusers==$(shell sed -n 's/^ *diffusers *>= *//p' setup.cfg)
OLDEST_WITH := huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
# The solvers' arithmetic, which most tests of the library are about, knows nothing of it.
OLDEST_TESTS := $(shell grep -lE "Scheduler|AMEDPredictor" tests/ld3_diffusers/test_*.py) tests/test_pipelines_run.py

.PHONY: help demo test test-main test-oldest test-lpips check style benchmark
.NOTPARALLEL:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "    make %-12s %s\n", $$1, $$2}' Makefile

demo: .venv/.installed ## learn a schedule for a small teacher and compare it with the stock ones
	.venv/bin/python -m training.demo

test: check test-lpips test-oldest test-main ## everything that continuous integration runs

test-main: .venv/.installed ## the whole suite
	.venv/bin/python $(PYTEST)

test-oldest: .venv-oldest/.installed ## schedulers and solvers with the oldest supported Diffusers
	.venv-oldest/bin/python $(PYTEST) -m "not slow" $(OLDEST_TESTS)

test-lpips: .venv-lpips/.installed ## LPIPS and Inception features, where lpips, torch-fidelity and torchvision are installed
	.venv-lpips/bin/python -m pytest tests/training/test_lpips.py tests/training/test_inception.py

check: .venv/.installed ## lint and format, changing nothing
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

style: .venv/.installed ## lint and format, mending what can be mended
	.venv/bin/python -m ruff check --fix --exit-zero --quiet .
	.venv/bin/python -m ruff format .
	.venv/bin/python -m ruff check .

benchmark: .venv/.installed ## what a step costs beside stock schedulers
	.venv/bin/python -m tests.benchmarks.step_overhead

# An interrupted installation leaves .unfinished behind, and the next one starts afresh; pip's cache makes that cheap.
# Most modules are never imported, so that compiling them beforehand (pip's habit) would be the larger part of the work.
.venv/.installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@if [ -e .venv/.unfinished ]; then rm -rf .venv; fi
	@mkdir -p .venv && touch .venv/.unfinished
	[ -x .venv/bin/pip ] || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --no-compile -c constraints.txt -e ".[training,dev]"
	$(PIP) install --quiet --no-compile -c constraints.txt --no-deps stlpips_pytorch
	@mv .venv/.unfinished $@

# Environments of their own that also see the packages of .venv, after their own ones: made in seconds.
.venv-oldest/.installed: .venv/.installed Makefile
	$(call beside,.venv-oldest)
	$(PIP) --python .venv-oldest/bin/python install --quiet --no-deps $(OLDEST) $(OLDEST_WITH)
	.venv-oldest/bin/python -c 'from importlib.metadata import version as v; assert "diffusers==" + v("diffusers") == "$(OLDEST)"'
	@touch $@

.venv-lpips/.installed: .venv/.installed Makefile
	$(call beside,.venv-lpips)
	$(PIP) --python .venv-lpips/bin/python install --quiet --no-deps -c constraints.txt lpips torch-fidelity torchvision
	@touch $@

purelib = $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
define beside
	rm -rf $(1)
	.venv/bin/python -m venv --without-pip $(1)
	echo "import site; site.addsitedir('$(call purelib,.venv)')" > "$(call purelib,$(1))/shared.pth"
endef
