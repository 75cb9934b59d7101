"""A process that cannot say why it ends: its watcher says it, and is silent otherwise."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from project import ROOT, lives, until

CRASHES = ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE"]
SAYS = "error: `limpid train_classifier unseen` "
WATCHED = """
import ctypes, os, signal, threading
from pathlib import Path
from pipelines.runner import watcher
watcher.KILLS = Path("vmstat")
watcher.watch(["train_classifier", "unseen"])
"""
# SIGTERM while compiled code never returns.
STUCK = """
from pipelines.runner import exit_codes
exit_codes.STUCK_S = 0.1
exit_codes.interruptible()
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
lock(mutex)
"""


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a watched process; return when its watcher has ended as well."""
    return subprocess.run(
        [sys.executable, "-c", WATCHED + code], cwd=folder, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("name", CRASHES)
def test_a_crash_is_one_sentence_and_the_file_has_the_place_and_the_versions(
    name: str, tmp_path: Path
) -> None:
    done = run(tmp_path, f"os.kill(os.getpid(), signal.{name})")
    assert done.returncode == -signal.Signals[name], "the signal ends the process as before"
    assert done.stderr.startswith(f"{SAYS}died in compiled code (") and done.stdout == ""
    assert "run it again" in done.stderr and done.stderr.count("\n") == 1
    kept = (tmp_path / ".limpid/last_error.txt").read_text()
    assert (
        "limpid train_classifier unseen" in kept and 'File "<string>", line 7 in <module>' in kept
    )
    assert "Python 3." in kept and "torch 2." in kept and "numpy " in kept


def test_a_crash_of_compiled_code_in_a_thread_is_said_too(tmp_path: Path) -> None:
    crash = "t = threading.Thread(target=ctypes.string_at, args=(0,)); t.start(); t.join()"
    done = run(tmp_path, crash)
    assert done.returncode == -signal.SIGSEGV
    assert done.stderr.startswith(f"{SAYS}died in compiled code (segmentation fault)")
    assert "string_at" in (tmp_path / ".limpid/last_error.txt").read_text()


@pytest.mark.parametrize(
    ("kills", "said"), [(3, "was killed from outside"), (4, "machine ran out of memory; lower")]
)
def test_a_killed_process_and_one_that_the_kernel_ended_for_memory(
    kills: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 5\noom_kill 3\n")
    counted = f"Path('vmstat').write_text('nr_free_pages 5\\noom_kill {kills}\\n')"
    done = run(tmp_path, f"{counted}\nos.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL
    assert done.stderr.startswith(SAYS) and said in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / ".limpid").exists()


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("from pipelines.runner.exit_codes import leave; leave(3)", 3),
        ("from pipelines.runner.exit_codes import interruptible; interruptible(); "
         "os.kill(os.getpid(), signal.SIGTERM)", 1),
        (STUCK, 130),
        ("watcher.leaves(); os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
    ids=["leaves", "interrupted", "stuck", "killed at its end"],
)  # fmt: skip
def test_nothing_is_added_where_a_process_ends_by_itself(
    end: str, code: int, tmp_path: Path
) -> None:
    done = run(tmp_path, end)
    assert done.returncode == code and "limpid train_classifier" not in done.stderr, done.stderr


def test_the_command_line_is_watched_and_its_watcher_ends_with_it(tmp_path: Path) -> None:
    """Signals for the whole group do not end the watcher, which answers none of them."""
    command = [sys.executable, "-m", "pipelines", "train_classifier", "unseen"]
    environment = {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        until(lambda: psutil.Process(process.pid).children())
        (watcher,) = psutil.Process(process.pid).children()
        time.sleep(0.1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            watcher.send_signal(number)
        process.send_signal(signal.SIGSEGV)
        _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGSEGV
    assert said.startswith(f"{SAYS}died in compiled code (segmentation fault)")
    until(lambda: not lives(watcher), 5)


def test_a_command_that_ends_by_itself_says_no_more_than_before() -> None:
    command = [sys.executable, "-m", "pipelines", "evalute"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no stage") and done.stderr.count("\n") == 1
