# Needs make and Python 3.11, 3.12 or 3.13; everything else goes into .venv, once. Works with GNU make 3.81 and newer.
# Parameters are taken from the command line only (make walkthrough DATA=cifar10), never from the environment.

MAKEFLAGS += --no-print-directory
SHELL := /bin/sh
.SUFFIXES:
.DEFAULT_GOAL := help
PYTHON_IN_VENV := .venv/bin/python

PARAMETERS := PRESET DATA DATA_ROOT EPOCHS BATCH_SIZE LIMIT SEED DEVICE OUTPUT_DIR BASELINE
UNKNOWN := $(strip $(foreach v,$(filter-out $(PARAMETERS) MAKEFLAGS MAKEFILES SHELL -*,$(.VARIABLES)),\
	$(if $(filter command,$(firstword $(origin $v))),$v)))
# (A make that calls this one hands its own down as if they were typed here, CC=gcc say: they are let be.)
$(if $(filter 0,$(MAKELEVEL)),$(if $(UNKNOWN),$(error unknown parameter $(UNKNOWN): allowed are $(PARAMETERS))))
GIVEN := $(strip $(foreach p,$(PARAMETERS),$(if $(filter command,$(firstword $(origin $p))),$(if $(value $p),$p))))

# A value reaches the shell through the environment, as it was typed: quotes, blanks and dollars are text.
$(foreach p,$(GIVEN),$(eval override $p := $$(value $p))$(eval export $p))

# Settings of the user's Python and pip that lend other packages or install elsewhere. Those that say where packages
# come from (PIP_INDEX_URL, PIP_CERT, ...) stay.
unexport PYTHONHOME PYTHONPATH PYTHONSAFEPATH PYTHONOPTIMIZE PYTHONPLATLIBDIR
unexport PIP_ROOT PIP_PYTHON PIP_DRY_RUN PIP_CONSTRAINT PIP_REQUIREMENT
PIP_INSTALL := $(PYTHON_IN_VENV) -m pip install --quiet --disable-pip-version-check --no-user --target= --prefix="$$PWD/.venv"

FLAG_PRESET := --preset
FLAG_DATA := --data
FLAG_DATA_ROOT := --data-root
FLAG_EPOCHS := --epochs
FLAG_BATCH_SIZE := --batch-size
FLAG_LIMIT := --limit
FLAG_SEED := --seed
FLAG_DEVICE := --device
FLAG_OUTPUT_DIR := --output
FLAG_BASELINE := --baseline
SETTINGS = $(foreach p,$(GIVEN),--set "$p=$$$p")
FLAGS = $(foreach p,$(GIVEN),$(FLAG_$p)="$$$p")

.PHONY: help walkthrough test test-all lab html lint debug sweep doctor doctor-power torture networks bench venv clean

help:
	@echo 'make walkthrough   run the notebook, write build/codeq_walkthrough.html'
	@echo 'make test          run the quick tests (within six minutes on two cores)'
	@echo 'make test-all      run all tests: real processes, whole notebooks and a browser, too'
	@echo 'make lab           open the notebook in JupyterLab with a trained run (OUTPUT_DIR=... names another)'
	@echo 'make html          write the page again from the notebook that was run last'
	@echo 'make debug         the same pipeline as a script, one line an epoch'
	@echo 'make sweep         three strengths of the penalty, three seeds each, on the digits (within half an hour)'
	@echo 'make doctor        examine a short run of the pipeline, check by check'
	@echo 'make doctor-power  break the pipeline in every known way, write docs/measured/doctor.md (within an hour)'
	@echo 'make torture       kill, damage and starve runs, write docs/measured/reliability.md (about 20 minutes)'
	@echo 'make networks      lead networks of torchvision and timm through every step, write docs/measured/networks.md (about half an hour)'
	@echo 'make bench         time a training step'
	@echo 'make lint          ruff and mypy'
	@echo 'make clean         remove build/ and caches (.venv, data and runs stay)'
	@echo ''
	@echo 'walkthrough and debug take $(PARAMETERS):'
	@echo '  make walkthrough DATA=cifar10 EPOCHS=20'

walkthrough: venv
	@$(PYTHON_IN_VENV) -m experiments.run_notebook $(SETTINGS)

# A worker a core, each with torch on one thread (tests/conftest.py).
test: venv
	@$(PYTHON_IN_VENV) -m pytest -n logical --dist worksteal -m 'not slow'

test-all: venv
	@$(PYTHON_IN_VENV) -m pytest -n logical --dist worksteal

lab: venv
	@$(PYTHON_IN_VENV) -m experiments.lab $(if $(filter OUTPUT_DIR,$(GIVEN)),--output="$$OUTPUT_DIR")

html: venv
	@$(PYTHON_IN_VENV) -m experiments.run_notebook --render-only

lint: venv
	@$(PYTHON_IN_VENV) -m ruff check --quiet .
	@$(PYTHON_IN_VENV) -m ruff format --quiet --check . || { echo 'layout differs: run $(PYTHON_IN_VENV) -m ruff format .' >&2; exit 1; }
	@$(PYTHON_IN_VENV) -m mypy --no-error-summary

debug: venv
	@$(PYTHON_IN_VENV) -m experiments.debug_run $(FLAGS)

sweep: venv
	@$(PYTHON_IN_VENV) -m experiments.sweep --preset smoke --set peak=0.005,0.01,0.02 --seeds 0,1,2

doctor: venv
	@$(PYTHON_IN_VENV) -m experiments.doctor

doctor-power: venv
	@$(PYTHON_IN_VENV) -m tests.faults.power

torture: venv
	@$(PYTHON_IN_VENV) -m tests.reliability

networks: venv
	@$(PYTHON_IN_VENV) -m tests.zoo

bench: venv
	@$(PYTHON_IN_VENV) -m experiments.bench

clean:
	@rm -rf build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv/installed.lock is the lock that was installed last: a changed lock installs again, an equal one costs nothing.
# Of two makes at once the second waits: this folder, opened as file 9, is locked until the shell ends.
# uv is fast; pip, which finds nothing left to do, has the last word.
venv:
	@installed() { cmp -s requirements.lock .venv/installed.lock && $(PYTHON_IN_VENV) -c '' 2>/dev/null; }; \
	if installed; then exit 0; fi; \
	suits() { "$$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1; }; \
	python=; \
	for candidate in python3 python3.13 python3.12 python3.11 python $(PYTHON_IN_VENV); do \
		if suits $$candidate; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo 'make: no Python 3.11, 3.12 or 3.13 found (looked for python3, python3.13, python3.12, python3.11, python).' >&2; \
		echo 'Install one, or put it on the PATH, and run make again.' >&2; \
		exit 1; \
	fi; \
	exec 9<.; \
	lock() { $$python -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX | $$1)" 2>/dev/null; }; \
	lock fcntl.LOCK_NB || { echo 'Waiting for another make, which installs the packages ...' >&2; lock 0; }; \
	if installed; then exit 0; fi; \
	echo 'Installing the pinned packages into .venv (once; some minutes) ...' >&2; \
	rm -f .venv/installed.lock; \
	uv=; if uv --version >/dev/null 2>&1; then uv=uv; fi; \
	if ! suits $(PYTHON_IN_VENV); then \
		rm -rf .venv; \
		if ! { [ -n "$$uv" ] && uv venv --quiet --seed --python "$$(command -v $$python)" .venv 2>/dev/null; }; then \
			$$python -m venv .venv || { rm -rf .venv; echo "make: $$python cannot make a virtual environment; the reason stands above." >&2; exit 1; }; \
		fi; \
	fi; \
	$(PYTHON_IN_VENV) -m ensurepip >/dev/null 2>&1; \
	if [ -z "$$uv" ] && $(PIP_INSTALL) uv >/dev/null 2>&1; then uv=.venv/bin/uv; fi; \
	if [ -n "$$uv" ]; then $$uv pip install --quiet --python $(PYTHON_IN_VENV) --require-hashes -r requirements.lock 2>/dev/null; fi; \
	$(PIP_INSTALL) --require-hashes -r requirements.lock || { echo 'make: the packages could not be installed; the reason stands above.' >&2; exit 1; }; \
	cp requirements.lock .venv/installed.lock
