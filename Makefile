# make setup      create .venv with the pinned dependencies, and install the missing system packages
# make train      set up, then train on recipes/code.yaml; RUN=name names the run folder runs/name
# make test       set up, then lint, types and the quick tests: what every change must pass
# make test-docker  set up, then the tests with a Docker daemon, which is installed and started where there is none
# make test-slow  set up, then the long tests: many seeds, chaos, soak; with a Docker daemon, as test-docker
# make clean      remove what make made; runs/ stays

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=

.PHONY: setup train test test-docker lint test-slow clean system
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

setup: system $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make setup: $(PYTHON) is" \
		"$$($(PYTHON) --version 2>&1), but cispo needs 3.11 or later; run: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The interpreter must be there, but its date says nothing: it is a link to one that is older or newer.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the pinned dependencies into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# bubblewrap is the sandbox; the C++ compiler makes the CPU kernels on first use.
system:
	@missing=; \
	command -v bwrap >/dev/null || missing="bubblewrap"; \
	command -v g++ >/dev/null || command -v clang++ >/dev/null || missing="$$missing g++"; \
	[ -n "$$missing" ] || exit 0; \
	if ! command -v apt-get >/dev/null; then run=; \
	elif [ "$$(id -u)" = 0 ]; then run=env; \
	elif sudo -n true 2>/dev/null; then run=sudo; \
	else run=; fi; \
	if [ -n "$$run" ]; then \
		echo "Installing the missing system packages:" $$missing; \
		{ $$run apt-get update -qq && $$run apt-get install -y -qq $$missing >/dev/null; } && exit 0; \
	fi; \
	echo "make setup: the sandbox needs bubblewrap and the CPU kernels a C++ compiler; missing and not to be installed" \
		"from here; run: sudo apt-get update && sudo apt-get install -y" $$missing >&2; exit 1

train: setup
	@run="$(RUN)"; n=1; \
	if [ -z "$$run" ]; then run=code; while [ -e "runs/$$run" ]; do n=$$((n + 1)); run=code-$$n; done; fi; \
	exec $(BIN)/cispo train recipes/code.yaml --name "$$run"

lint: setup
	@$(BIN)/ruff check -q .
	@$(BIN)/mypy --no-error-summary

test: lint
	@$(BIN)/pytest -q $(PYTEST_ARGS)

test-docker: MARKED := docker and not slow
test-slow: MARKED := slow and not gpu

# A daemon without a bridge changes nothing in the machine's network. It is ended only if it was started here.
test-docker test-slow: setup
	@command -v dockerd >/dev/null && command -v mmdebstrap >/dev/null \
		|| { apt-get update -qq && apt-get install -y -qq docker.io mmdebstrap >/dev/null; }
	@log=$$(mktemp); pid=; trap '[ -z "$$pid" ] || { kill $$pid; wait $$pid || true; }; rm -f $$log' EXIT; \
	if ! docker info >/dev/null 2>&1; then \
		dockerd --bridge=none --iptables=false >$$log 2>&1 & pid=$$!; \
		for _ in $$(seq 60); do docker info >/dev/null 2>&1 && break; sleep 0.5; done; \
		docker info >/dev/null 2>&1 || { tail -5 $$log >&2; exit 1; }; \
	fi; \
	docker image inspect cispo-sandbox >/dev/null 2>&1 || $(BIN)/python -m cispo.sandboxes.build_image; \
	$(BIN)/pytest -q -m "$(MARKED)" $(PYTEST_ARGS)

clean:
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
