# Every command a person types. `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN ?= examples/embedded.toml
ARGS ?=
FOLDER ?= backends
BIN := .venv/bin
# pytest rewrites every test file: without __pycache__ it does so in each process of each call, for six seconds.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup environment run run-cluster up down test lint check format docs clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: ## create .venv and the starting model, if they are missing
	@$(PYTHON) tools/setup.py

environment:
	@$(PYTHON) tools/setup.py --no-model

run: setup ## train a small model to use a tool, asynchronously, on vLLM (RUN=file.toml ARGS="--key=value")
	@$(BIN)/python -m services $(RUN) $(ARGS)

run-cluster: RUN = examples/cluster.toml
run-cluster: setup ## the same over a real Kafka and a real MinIO, started by `make up`
	@$(BIN)/python -m tools.backends up $(FOLDER)
	@. $(abspath $(FOLDER))/environment && $(BIN)/python -m services $(RUN) $(ARGS)

test: setup ## every test, real engine and servers included
	@$(BIN)/python -m pytest -m "not servers and not vllm" -n 2 -q $(ARGS)
	@$(BIN)/python -m pytest -m "servers or vllm" $(ARGS)

lint: environment ## format, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

check: setup lint ## the same and the fast tests
	@$(BIN)/python -m pytest -m "not servers and not vllm" -n 2 -q $(ARGS)

format: environment ## write the code in the house format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: environment ## make the references of configuration, metrics and messages from the code
	@$(BIN)/python -m tools.references

up: environment ## start a Kafka and a MinIO on this machine, got first if they are missing (FOLDER=backends)
	@$(BIN)/python -m tools.backends up $(FOLDER) $(ARGS)

down: environment ## stop them; data stays
	@$(BIN)/python -m tools.backends down $(FOLDER)

clean: ## remove everything that setup and runs created
	rm -rf .venv .setup models runs
