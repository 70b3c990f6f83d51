# Everything a person types here. Needs GNU make and Python 3.11 or newer; `make test` also
# Java 17 and Maven. Nothing is written outside this folder but package caches.

PYTHON ?= python3
BIN := .venv/bin
RECENT := -c 'import sys; sys.exit(sys.version_info < (3, 11))'

.ONESHELL:
.SHELLFLAGS := -euc
.DEFAULT_GOAL := help
.PHONY: help env demo demo-learn test lint chaos chaos-real fuzz bench evaluation clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

env: ## the Python environment in .venv, as requirements.lock pins it
	@want="$$(cat requirements.lock pyproject.toml | sha256sum) $(CURDIR)"
	if $(BIN)/python $(RECENT) 2>/dev/null && [ "$$(cat .venv/synced 2>/dev/null)" = "$$want" ]; then
	    exit 0
	fi
	if ! $(PYTHON) $(RECENT) 2>/dev/null; then
	    echo >&2 "Penchant needs Python 3.11 or newer, and $(PYTHON) is not: name one that is," \
	        "as in \`make $(MAKECMDGOALS) PYTHON=python3.12\`"
	    exit 1
	fi
	if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then
	    echo >&2 "$(PYTHON) cannot make an environment: type \`apt-get install python3-venv\` as root"
	    exit 1
	fi
	if ! $(BIN)/python $(RECENT) 2>/dev/null || [ ! -x $(BIN)/uv ]; then
	    $(PYTHON) -m venv --clear .venv
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.8'
	fi
	# No package but those in the lock: two of them carry data, and their own dependencies are
	# left out on purpose (pyproject.toml says which).
	export VIRTUAL_ENV="$(CURDIR)/.venv"
	echo "Installing what requirements.lock pins into .venv (the first time a few GB: torch)"
	$(BIN)/uv pip sync $$([ -t 2 ] || echo --quiet) requirements.lock
	$(BIN)/uv pip install --quiet --no-deps --editable .
	echo "Compiling the worker's inner loops for this machine (once, half a minute)"
	$(BIN)/python -m stream.compile_ahead
	echo "$$want" > .venv/synced

demo: env ## real shoppers' events through broker, encoder and Redis, live; Ctrl-C ends it
	@exec $(BIN)/penchant demo

demo-learn: env ## the same with the learning loop: fine-tuning, gate and hot swap while events flow
	@exec $(BIN)/penchant demo --learn

test: env lint ## everything, on Apache Kafka and Redis
	@exec $(BIN)/python -m pytest -n 2 --dist loadfile

lint: env ## ruff, mypy and the direction of imports
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

chaos: env ## crashes, stalls, lost replies, failovers, simulated: SEEDS=10000, or one SEED=1234 with its trace
	@exec env PYTHONHASHSEED=0 $(BIN)/python -m tests.chaos.simulated \
	    $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),400)) $(if $(WRITE),--write $(WRITE))

fuzz: env ## broken bytes for parsers, codecs, releases and the port: CASES=10000000
	@exec $(BIN)/python -m tests.fuzz --cases $(or $(CASES),200000) $(if $(WRITE),--write)

chaos-real: env ## the same on real servers: kills, stalls, cuts, full disks, overload; 16 minutes, as root
	@exec $(BIN)/python -m tests.chaos.real $(if $(SCHEDULE),--schedule "$(SCHEDULE)") $(if $(SEED),--seed $(SEED)) \
	    $(if $(WRITE),--write)

bench: env ## throughput and freshness beside pipelines on Faust, Quix Streams and Bytewax
	@exec $(BIN)/python -m tests.bench

evaluation: env ## docs/evaluation.md's figures, on the sets in the folder DATA=…; hours
	@if [ -z "$(DATA)" ]; then echo >&2 "Name the folder of the sets: make evaluation DATA=folder"; exit 1; fi
	exec env OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.quality.document $(DATA)

clean: ## stops the local stack; removes what can be made again, .venv included
	@if [ -e .penchant/stack.json ]; then $(BIN)/penchant down; fi
	rm -rf .venv .penchant .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
