# All user commands. `make help` lists them.
PYTHON ?=
RUN ?= examples/embedded.toml
ARGS ?=
FOLDER ?= backends
IMAGE ?= palimpsest-light.tar
BIN := .venv/bin
WITH_PYTHON = PYTHON='$(PYTHON)' GOALS='$(MAKECMDGOALS)' sh tools/python.sh
# Without __pycache__, every pytest process compiles all test files, which takes six seconds.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := $(BIN)/python -m pytest
SIDE_BY_SIDE := -n 2
KEPT = --durations=25 --junitxml=.setup/durations/$@.xml
NAMED = $(findstring tests/,$(ARGS))

.DEFAULT_GOAL := help
.PHONY: help setup environment doctor run run-cluster up down image test test-long lint check format docs pins clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: ## create .venv and the starting model if they are missing (PYTHON=/path/to/python3.12)
	@$(WITH_PYTHON) -m tools.setup

environment:
	@$(WITH_PYTHON) -m tools.setup --no-model

doctor: ## check this machine: every result, its meaning and the remedy (RUN=file.toml ARGS="--key=value")
	@ANY_PYTHON=1 $(WITH_PYTHON) -m palimpsest.doctor $(RUN) $(ARGS)

run: setup ## train a small model to use a tool, asynchronously, on vLLM (RUN=file.toml ARGS="--key=value")
	@$(BIN)/palimpsest doctor --quiet $(RUN) $(ARGS)
	@$(BIN)/palimpsest run $(RUN) $(ARGS)

run-cluster: RUN = examples/cluster.toml
run-cluster: setup ## run the same example on Kafka and MinIO, which `make up` starts
	@$(BIN)/palimpsest doctor --quiet $(RUN) $(ARGS)
	@$(BIN)/python -m tools.backends up $(FOLDER)
	@. $(abspath $(FOLDER))/environment && $(BIN)/palimpsest run $(RUN) $(ARGS)

test: setup ## run every test except the long ones, with a real engine and real servers (ARGS=tests/file.py::test runs one)
	@$(PYTEST) $(if $(NAMED),,$(SIDE_BY_SIDE) -m "not long" $(KEPT)) $(ARGS)

test-long: setup ## run the long tests: the complete example run, thousands of schedules, soaks
	@$(PYTEST) $(SIDE_BY_SIDE) -m long $(KEPT) $(ARGS)

lint: environment ## check format, lint rules, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

check: setup lint ## run lint and the fast tests
	@$(PYTEST) $(SIDE_BY_SIDE) -q -m "not thorough and not servers and not vllm and not long" --hypothesis-profile=few $(KEPT) $(ARGS)

format: environment ## format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: environment ## generate the references in docs/ and the schema of the chart's values
	@$(BIN)/python -m tools.references

up: environment ## start a Kafka and a MinIO on this machine; download them if they are missing (FOLDER=backends)
	@$(BIN)/python -m tools.backends up $(FOLDER) $(ARGS)

down: environment ## stop Kafka and MinIO; keep their data
	@$(BIN)/python -m tools.backends down $(FOLDER)

image: environment ## build the image of the gateway and the store without Docker (IMAGE=palimpsest-light.tar)
	@$(BIN)/python -m tools.images light $(IMAGE) $(ARGS)

pins: environment ## resolve the pinned sets in requirements/ again, for every Python (ARGS=--upgrade)
	@$(BIN)/python -m tools.pins $(ARGS)

clean: ## remove everything that setup and runs created
	rm -rf .venv .setup models runs
