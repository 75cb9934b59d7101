# Two commands: `make demo` shows the whole line on digits, `make test` runs what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# DVC runs `python` of the environment; idle threads wait passively (benchmarks/threads.py).
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test faults lint clean

demo: $(VENV)/.demo
	@dvc repro; status=$$?; python -m pipelines.scores && exit $$status

test: lint
	pytest

# Every fault for real, and the whole line on two nodes: about an hour at most.
faults: $(VENV)/.test
	pytest -m faults

lint: $(VENV)/.test
	ruff format --check .
	ruff check .
	mypy
	lint-imports --no-cache

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .limpid data models pool adversarial reports mlflow.db mlruns dvc.lock
