"""Where things run and where bytes live; no mathematics.

Importing this package sets defaults that must stand before torch and Ray are imported, and
nothing else: idle OpenMP threads wait passively (spinning ones make two processes on two cores
14 times slower, `benchmarks/threads.py`), Ray Train sees within half a second instead of two that
its workers have ended, an embedded Ray listens on the loopback interface alone and looks for its
own sockets without sleeping a second in between, no call starts a Ray that nobody asked for, and
MLflow unpickles nothing.
"""

import os

# Who started this process. Asked here, since who dies while torch is imported is not there to ask.
PARENT = os.getppid()

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
os.environ.setdefault("RAY_raylet_client_connect_timeout_milliseconds", "20")
os.environ.setdefault("RAY_raylet_client_num_connect_attempts", "250")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
    # Ray's word for the systems on which this is its default; in a job it would cut off the nodes.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
