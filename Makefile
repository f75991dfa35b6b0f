# `make demo` and `make test` do all the set-up themselves; they need git, make and Python 3.10 or newer.

PYTHON ?= python3
VENV ?= .venv
# An exact version instead of the newest supported one: make test VENV=.venv-floor TRANSFORMERS=5.17.0
TRANSFORMERS ?=
TORCH := 2.13.0
PYTEST_FLAGS ?= -n 2

QUESTION := Into how many other parishes did the distemper spread?

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Small models on a few cores: one thread per process is the fastest, and the same everywhere.
test test-slow transformers-suites: export OMP_NUM_THREADS := 1

.PHONY: demo test test-slow transformers-suites lint format recipe clean

demo: $(VENV)/.installed
	model=$$($(BIN)/fastlongspeech small) && $(BIN)/fastlongspeech ask small/recording.opus "$(QUESTION)" --model "$$model"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

transformers-suites: $(VENV)/.installed-dev
	$(BIN)/python tests/transformers_suites/run.py $(PYTEST_FLAGS)

# mypy has to see the root under the package's name, whatever the clone's folder is called
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	mkdir -p .cache/typing && ln -sfn ../.. .cache/typing/fastlongspeech
	MYPYPATH=.cache/typing $(BIN)/mypy -p fastlongspeech

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

recipe: $(VENV)/.installed-dev
	PATH="$(abspath $(BIN)):$$PATH" bash demo/run.sh

clean:
	rm -rf .venv .venv-* .cache .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info

$(VENV)/.installed: pyproject.toml | $(VENV)/.torch
	$(PIP) install --quiet --editable '.[small]' $(TRANSFORMERS:%=transformers==%)
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.torch
	$(PIP) install --quiet --editable '.[dev]' $(TRANSFORMERS:%=transformers==%)
	touch $@ $(VENV)/.installed

# PyPI's torch for Linux brings gigabytes of CUDA. Without an NVIDIA GPU, ask for the CPU build: first wherever pip looks
# anyway (a machine may provide that wheel), then in PyTorch's own index, and only then take what PyPI has.
$(VENV)/.torch: | $(VENV)/bin/python
	if nvidia-smi > /dev/null 2>&1; then \
	    $(PIP) install 'torch==$(TORCH)'; \
	else \
	    $(PIP) install --quiet 'torch==$(TORCH)+cpu' 2> /dev/null \
	    || $(PIP) install 'torch==$(TORCH)' --index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15 \
	    || $(PIP) install 'torch==$(TORCH)'; \
	fi
	touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo 'Python 3.10 or newer is needed; name one with: make PYTHON=/path/to/python3 ...'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null \
	    || { echo 'Python lacks its venv module; on Debian and Ubuntu: sudo apt-get install python3-venv'; exit 1; }
	$(PYTHON) -m venv $(VENV)
