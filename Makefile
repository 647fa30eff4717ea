PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml constraints.txt $(wildcard lora_runtime/kernels/csrc/*)
PROTOS := $(wildcard protos/loramux/v1/*.proto)
SERVICES := $(shell grep -l '^service ' $(PROTOS) /dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test bench soak test-gpu-compile lint docs families protos clean

help:
	@echo "make demo    train two adapters, serve them and the base in one batch, stream the answers"
	@echo "make test    run the whole test suite        (ARGS='-k name -x' goes to pytest)"
	@echo "make soak    attack a server at full size for up to half an hour and print the figures"
	@echo "make test-gpu-compile  compile every GPU launch for four cards, without a GPU; long: try"
	@echo "                       ARGS='--cards 90' first"
	@echo "make bench   measure batches of adapters beside PEFT, transformers and the floor: ten minutes,"
	@echo "             a table and a picture; Ctrl-C keeps whole rounds (ARGS='--no-peers' takes six,"
	@echo "             ARGS='--peer openvino=FILE.gguf' adds others)"
	@echo "make lint    ruff (rules and format), import-linter, mypy and buf lint"
	@echo "make docs    write docs/settings.md anew"
	@echo "make families  try every family of models and write docs/families.md anew; ten minutes"
	@echo "make protos  regenerate the code of protos/"
	@echo "make clean   remove $(VENV), build outputs and caches"

demo: $(VENV)/installed
	$(BIN)/python deploy/demo/run.py $(ARGS)

# PYTHONDONTWRITEBYTECODE, which containers set, would have each process compile every module again.
test: $(VENV)/installed-test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

test-gpu-compile: $(VENV)/installed-test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.lora_runtime.kernels.compile_launches all $(ARGS)

bench: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m bench.serving $(ARGS)

soak: $(VENV)/installed-test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 timeout 1800 $(BIN)/python -m pytest tests/soak --soak -q $(ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/buf lint protos

docs: $(VENV)/installed-test
	$(BIN)/python docs/settings.py > docs/settings.md

families: $(VENV)/installed-test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python docs/families.py > docs/families.tmp
	mv docs/families.tmp docs/families.md

protos: $(VENV)/installed-test
	$(BIN)/buf lint protos
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=protos --pyi_out=protos $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -I protos --grpc_python_out=protos $(SERVICES)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "loramux needs Python 3.11 or newer; say which with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python $(SOURCES)
	@echo "Installing loramux into $(VENV) (about a minute, 1.5 GB) ..."
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "Installing the test tools ..."
	$(PIP_INSTALL) -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find lora_runtime loramux server protos tests bench deploy -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f lora_runtime/kernels/*.so
