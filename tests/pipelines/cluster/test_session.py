"""The embedded Ray of a stage ends with its stage."""

import signal
import sys
from pathlib import Path

import project
import psutil
from project import until

KILLED = """
import os, signal
import psutil
from pipelines.cluster import session
from pipelines.config.resources import Workers

with session.hold(Workers(workers=1, cpus=1, gpus=0)):
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_of_an_embedded_ray_outlives_a_killed_stage(tmp_path: Path) -> None:
    code, printed = project.run(project.copy_to(tmp_path / "project"), sys.executable, "-c", KILLED)
    assert code == -signal.SIGKILL, printed
    started = [int(one) for one in printed.split()]
    assert len(started) > 5
    until(lambda: not any(p.pid in started and project.lives(p) for p in psutil.process_iter()), 15)
