# Two commands: `make demo` shows the whole line on digits, `make test` runs what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# DVC runs the `python` of the environment; idle threads wait passively (benchmarks/threads.py).
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test slow faults gpu lint ui audit lock clean

demo: $(VENV)/.installed
	@dvc repro; status=$$?; limpid scores && exit $$status

# The tests of a file run in one process, in order; those that wait for the line run last.
test: lint
	pytest -n 2 --dist loadfile --no-loadscope-reorder

# Shows in more cases what faster tests show; minutes.
slow: $(VENV)/.installed
	pytest -n 2 --dist loadfile -m slow

# Provokes every fault for real, and runs the whole line on two nodes; at most an hour.
faults: $(VENV)/.installed
	pytest -m faults

# On a machine with a GPU: the tests that need one, and timings; at most eight minutes. It installs
# nothing: a torch with CUDA has to be there.
OUT ?= .limpid/gpu
gpu:
	python3 benchmarks/gpu.py --out $(OUT)

lint: $(VENV)/.installed
	ruff format --check .
	ruff check .
	mypy
	lint-imports --no-cache

# MLflow's UI for this machine alone: it takes no jobs, and no request of another host or origin.
PORT ?= 5000
ui:
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
	MLFLOW_CREATE_MODEL_VERSION_SOURCE_VALIDATION_REGEX='^(mlflow-artifacts|models|runs):/' \
	mlflow server --backend-store-uri sqlite:///mlflow.db --workers 1 --host 127.0.0.1 \
	  --port $(PORT) --allowed-hosts localhost:$(PORT),127.0.0.1:$(PORT)

audit:
	.ci/audit

# Everything but torch is installed with hashes; the build of torch differs by machine. Torch is last,
# so that its dependencies are there already.
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
