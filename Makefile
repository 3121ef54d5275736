# Every target does its own set-up: a virtual environment in .venv with a pinned torch.
#
#   make demo       the main job: quantize the pocket model, sample every level, one contact sheet
#   make test       the test suite          make test-all   the slow tests too, one after another
#   make lint       ruff format and lint    make bench      benchmarks of this machine
#   make audit      known vulnerabilities of what is installed, by pip-audit (asks pypi.org)
#
# PYTHON picks the interpreter (3.11 to 3.13); PIP_ARGS is passed to every pip install; JOBS is how
# many processes share the tests.

SHELL := /bin/bash
.DEFAULT_GOAL := help

usable = $(shell $(1) -c 'import sys; print(int((3, 11) <= sys.version_info[:2] <= (3, 13)))' 2>/dev/null)
PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13,$(if $(filter 1,$(call usable,$(p))),$(p))))
VENV ?= .venv
PIP_ARGS ?=
JOBS ?= 2
TORCH ?= torch==2.13.0
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.ready

export OMP_NUM_THREADS ?= 2
export PYTHONUTF8 = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup demo test test-all lint bench audit clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -9

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.txt
	@if [ -z "$(PYTHON)" ]; then echo "no Python 3.11 to 3.13 found: install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; fi
	@echo "[1/3] virtual environment in $(VENV) ($$($(PYTHON) --version))"
	@[ -x $(RUN) ] || $(PYTHON) -m venv $(VENV)
	@echo "[2/3] $(TORCH) (the largest download)"
	@$(RUN) -m pip install --progress-bar on $(PIP_ARGS) "$(TORCH)"
	@echo "[3/3] this package with its demo and test extras"
	@$(RUN) -m pip install --progress-bar on $(PIP_ARGS) -e ".[demo,test]"
	@touch $(STAMP)

demo: setup
	$(RUN) -m ideogram4_quant demo --out demo-out

# a file of tests stays in one process, so that its fixtures are made once
test: export OMP_NUM_THREADS = 1
test: setup
	$(RUN) -m pytest -m "not slow" -n $(JOBS) --dist loadfile

test-all: setup
	$(RUN) -m pytest

lint: setup
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

bench: setup
	$(RUN) -m ideogram4_quant bench
	$(RUN) benchmarks/bench_linear.py
	$(RUN) benchmarks/bench_blocks.py
	$(RUN) benchmarks/bench_encode.py
	$(RUN) -m ideogram4_quant card --render docs/cards

# pip-audit says "no known vulnerabilities" of packages that it could not look up; --strict does not.
audit: setup
	@[ -x $(VENV)-audit/bin/pip-audit ] || { $(PYTHON) -m venv $(VENV)-audit && $(VENV)-audit/bin/python -m pip install -q $(PIP_ARGS) pip-audit; }
	@$(RUN) -m pip freeze --exclude-editable | sed -n 's/^\([A-Za-z0-9._-]*==[^+]*\).*/\1/p' > $(VENV)-audit/installed.txt
	@$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip --timeout 60 --progress-spinner off $(AUDIT_ARGS) -r $(VENV)-audit/installed.txt \
	  && echo "audit: $$(wc -l < $(VENV)-audit/installed.txt) packages, none with a known vulnerability" \
	  || { echo "audit: a package is vulnerable, or the audit was NOT made: where the lines above speak of 'not found on PyPI' or of a connection, pypi.org cannot be asked from here (another service: make audit AUDIT_ARGS='-s osv')"; exit 1; }

clean:
	rm -rf $(VENV) $(VENV)-audit build dist demo-out *.egg-info
