# make demo: the whole way once, on a real model. make test: the test suite. Both set themselves up first.
PYTHON ?= python3.11
VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
DEMO := demo
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE := setup.py $(shell find cast_serve/kernels/csrc -type f)

.PHONY: demo test vllm test-vllm lint bench-kernels sanitize clean

demo: $(VENV)/.installed
	$(BIN)/python -m benchmarks.registry demo $(DEMO)
	$(BIN)/cast pipeline $(DEMO)/SmolLM2-135M-Instruct \
		--data $(DEMO)/train.jsonl --heldout $(DEMO)/heldout.jsonl --out $(DEMO)/out

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

# vLLM for CPUs pins versions that the rest does not have, so it lives in an environment of its own:
# .venv-vllm/bin/vllm serves packed directories, cast serve --engine vllm too.
vllm: $(VLLM_VENV)/.installed

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest tests/vllm --disable-warnings \
		--numprocesses logical --maxprocesses 2 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

sanitize: $(VENV)/.installed
	$(BIN)/python -m tests.cast_serve.kernel_check

bench-kernels: $(VENV)/.installed
	$(BIN)/python -m benchmarks.kernels

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info

# torch comes first, by its exact version: the extension is built against it, without build isolation.
$(VENV)/.torch:
	@command -v $(PYTHON) > /dev/null || { echo "error: $(PYTHON) is not installed: install it or set PYTHON"; exit 2; }
	@echo "setting up $(VENV): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" wheel
	$(PIP) torch==2.13.0
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(PIP) --no-build-isolation -e ".[dev]"
	@touch $@

$(VLLM_VENV)/.vllm: cast_serve/vllm_plugin/install_cpu.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM_VENV)/bin/python $<
	@touch $@

$(VLLM_VENV)/.installed: $(VLLM_VENV)/.vllm pyproject.toml $(NATIVE)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[vllm-test]"
	@touch $@
