# Two commands: `make demo` (digits from noise) and `make test`. Each makes the virtual
# environment it needs and is quick when that exists. Another interpreter: PYTHON=python3.12.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet

.PHONY: demo test test-all lint types clean

demo: $(VENV)/.demo
	$(RUN) experiments/quickstart.py

test: $(VENV)/.dev
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/.dev
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m ""

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.dev
	$(RUN) -m pyright

# Where Python comes without venv's pip (Debian), virtualenv does the same.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sdegen needs Python 3.11 or newer; try: make PYTHON=python3.12 ..."; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV); \
	  $(PYTHON) -m pip install --quiet --target .bootstrap virtualenv && \
	  PYTHONPATH=.bootstrap $(PYTHON) -m virtualenv --quiet $(VENV); }

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@echo "installing sdegen and what the demo needs (a minute or two, once)"
	@$(PIP) --editable '.[cli,data,plot]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo "installing sdegen and its test tools (a minute or two, once)"
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .bootstrap
