# Two commands: `make demo` shows the whole line on digits, `make test` runs what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# DVC runs `python` of the environment; idle threads wait passively (benchmarks/threads.py).
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test faults lint ui audit lock clean

demo: $(VENV)/.installed
	@dvc repro; status=$$?; limpid scores && exit $$status

# A file's tests stay together, and in order: those that wait for the line come last.
test: lint
	pytest -n 2 --dist loadfile --no-loadscope-reorder

# Every fault for real, and the whole line on two nodes: about an hour at most.
faults: $(VENV)/.installed
	pytest -m faults

lint: $(VENV)/.installed
	ruff format --check .
	ruff check .
	mypy
	lint-imports --no-cache

# MLflow's pages, for this machine alone: nobody else may send it jobs, nor have a browser do so.
PORT ?= 5000
ui:
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
	MLFLOW_CREATE_MODEL_VERSION_SOURCE_VALIDATION_REGEX='^(mlflow-artifacts|models|runs):/' \
	mlflow server --backend-store-uri sqlite:///mlflow.db --workers 1 --host 127.0.0.1 \
	  --port $(PORT) --allowed-hosts localhost:$(PORT),127.0.0.1:$(PORT)

audit:
	.ci/audit

# All but torch comes with the hashes it was run with; torch's build differs by machine. What is
# there already is not looked at again, so torch comes last and finds all it shares with others.
$(VENV)/.installed: pyproject.toml constraints.txt requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-deps -e .
	$(BIN)/python -m pip check
	@touch $@

lock:
	uv pip compile --quiet --no-deps --universal --generate-hashes --no-annotate --no-header \
	  --python-version 3.11 --no-emit-package torch constraints.txt -o requirements.lock

clean:
	rm -rf $(VENV) .limpid data models pool adversarial reports mlflow.db mlruns dvc.lock
