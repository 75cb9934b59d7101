"""Exit codes of stages: unusable parameters, and compiled code that blocks a signal."""

import os
import subprocess
import sys
import time
from pathlib import Path

import project

STUCK = """
import ctypes
from pipelines.runner import exit_codes

exit_codes.STUCK_S = 0.5
exit_codes.interruptible()
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
print("stuck", flush=True)
lock(mutex)
"""


def test_a_gpu_that_is_not_there_is_refused_before_anything_starts(
    reproduced: Path, tmp_path: Path
) -> None:
    folder = project.copy_to(tmp_path / "project")
    os.symlink(reproduced / "data", folder / "data")
    params = project.tiny()
    params["resources"]["train"] = {"workers": 1, "cpus": 1, "gpus": 1}
    project.write_params(folder, params)
    command = [sys.executable, "-m", "pipelines", "train_classifier", "standard"]
    code, printed = project.run(folder, *command, CUDA_VISIBLE_DEVICES="")
    assert code == 2, printed
    assert "ask for 1 workers with 1 GPU each, and this machine has 0" in printed
    assert "Traceback" not in printed


def test_an_unknown_stage_among_resources_is_named(tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "project")
    params = project.tiny()
    params["resources"]["stages"] = {"evaluat": {"shards": params["resources"]["shards"]}}
    project.write_params(folder, params)
    code, printed = project.stage(folder, "prepare_data")
    assert code == 2 and "did you mean evaluate?" in printed, printed


def test_sigterm_ends_a_process_that_compiled_code_blocks() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "stuck\n"
        time.sleep(0.5)
        process.terminate()
        try:
            assert process.wait(20) == 130
        finally:
            process.kill()
