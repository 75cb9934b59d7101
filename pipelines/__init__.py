"""Where things run and where bytes are stored; no mathematics.

Importing this package ends a process whose Python is too old or too new. It sets environment
defaults that torch, Ray and MLflow read when they are imported, and does nothing else:
- idle OpenMP threads wait passively (spinning ones make two processes on two cores 14 times
  slower, `benchmarks/threads.py`);
- Ray Train notices within half a second, not two, that its workers have finished;
- no call starts a Ray by itself, an embedded Ray listens only on the loopback interface, and Ray
  hides no GPU from a process that asked for none;
- MLflow sends no telemetry, prints no URLs and unpickles nothing.
"""

import os
import sys

if not (3, 11) <= sys.version_info[:2] < (3, 14):
    # In the syntax of every Python: an old one cannot read the modules of this package.
    about = sys.executable + " is Python " + sys.version.split()[0]
    sys.stderr.write("error: Limpid needs Python 3.11 to 3.13, and " + about + "\n")
    sys.exit(4)

# The process that started this one. Read here, because it may die while torch is imported.
PARENT = os.getppid()

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
    # Ray then binds to the loopback interface, as it does on Windows and macOS. Not in a job: there
    # it would cut the nodes off from each other.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
