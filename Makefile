# Everything runs in .venv, made on first use: a fresh machine needs Python >= 3.10 and make.
PYTHON ?= python3
PYTEST_ARGS ?=
FUZZ_ARGS ?=
TORTURE_ARGS ?=
ZOO_ARGS ?=
ROUND_TRIP_ARGS ?=
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet

.PHONY: demo test zoo fuzz torture bench lint
.DEFAULT_GOAL := test

demo: .venv/.installed
	$(PY) examples/digits.py --config configs/digits_resnet.yaml

# Two processes, a file at a time: what a file prepares once stays in one of them.
test: .venv/.installed .zoo/.installed
	$(PY) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# The invariants alone: over the small topologies, then over every real model, each in a process of its own; and what
# is written and exported, read back.
zoo: .venv/.installed .zoo/.installed
	$(PY) -m pytest $(PYTEST_ARGS) $(wildcard tests/test_zoo.py tests/test_invariants*.py)
	PYTHONPATH=. $(PY) -W ignore benchmarks/zoo_models.py $(ZOO_ARGS)
	PYTHONPATH=. $(PY) -W ignore benchmarks/round_trip.py $(ROUND_TRIP_ARGS)
	$(PY) -m pytest $(PYTEST_ARGS) --all-models tests/test_transformers.py

# Random networks: 20,000 of them, or as many as EXAMPLES says; what was looked at before is not looked at again.
fuzz: .venv/.installed
	PYTHONPATH=. $(PY) -m tests.fuzz_run $(FUZZ_ARGS)

# Runs that are killed at random moments and resumed, and every kind of run that stops, resumes and is exported.
torture: .venv/.installed
	PYTHONPATH=. OMP_NUM_THREADS=1 $(PY) -m tests.torture $(TORTURE_ARGS)

# The last one takes hours; it goes on where it was stopped.
bench: .venv/.installed .zoo/.installed
	for name in analysis planning step overhead distillation latency latency_target large quality recovery zoo; do PYTHONPATH=. $(PY) -W ignore "benchmarks/$$name.py" || exit 1; done

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/codespell

.venv/.installed: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt -e ".[test]"
	touch $@

# Apart from the environment: a torchvision whose operators do not fit this torch build would break `import lightning`.
.zoo/.installed: constraints.txt .venv/.installed
	rm -rf .zoo
	$(PIP) install -c constraints.txt --no-deps --target .zoo torchvision timm torch-pruning
	touch $@
