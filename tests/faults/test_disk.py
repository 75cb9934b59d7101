"""Disks that are full or read-only, files that were altered, and DVC's own files."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import project
import pytest
from project import resumed, until

from components.data.shards import sha256
from faults.conftest import STANDARD, states

pytestmark = pytest.mark.faults
Mount = Callable[[Path, str], None]


def test_a_training_resumes_after_its_disk_was_full(
    folder: Path, undisturbed: Path, small_disk: Mount
) -> None:
    small_disk(folder / ".limpid/work", "900k")
    code, printed = project.run(folder, *STANDARD, "--out=out")
    assert code == 4 and "No space left" in printed, printed
    assert "Traceback" not in printed and not (folder / "out").exists()
    small_disk(folder / ".limpid/work", "20m")
    code, printed = project.run(folder, *STANDARD, "--out=out")
    assert code == 0, printed
    assert sha256(folder / "out/weights.safetensors") == sha256(undisturbed)


def test_crafting_resumes_after_its_disk_was_full_without_partial_files(
    folder: Path, reproduced: Path, small_disk: Mount
) -> None:
    os.symlink(reproduced / "models", folder / "models")
    small_disk(folder / ".limpid/sets", "40k")
    command = [sys.executable, "-m", "pipelines", "craft_training_set", "--train=data/train"]
    command += ["--classifier=models/standard", "--out=pool"]
    code, printed = project.run(folder, *command)
    assert code == 4 and "No space left" in printed, printed
    assert not (folder / "pool").exists()
    small_disk(folder / ".limpid/sets", "20m")
    code, printed = project.run(folder, *command)
    assert code == 0, printed
    assert not list((folder / ".limpid/sets").rglob("*.tmp"))
    for path in (folder / "pool").iterdir():
        assert sha256(path) == sha256(reproduced / "pool" / path.name), path.name


def test_a_folder_that_cannot_be_written_is_named(folder: Path, small_disk: Mount) -> None:
    small_disk(folder / ".limpid", "1m")
    subprocess.run(["mount", "-o", "remount,ro", str(folder / ".limpid")], check=True)
    code, printed = project.run(folder, *STANDARD, "--out=out")
    assert code == 4, printed
    assert "Read-only file system: '.limpid" in printed.replace("\n", "")
    assert "Traceback" not in printed


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty"])
def test_a_training_passes_over_a_damaged_newest_state(
    folder: Path, undisturbed: Path, harm: str
) -> None:
    process = project.start(folder, *STANDARD, "--out=out")
    until(lambda: len(states(folder)) >= 2, 120)
    process.kill()
    process.wait()
    newest = states(folder)[-1].parent / "state.pt"
    before = int(states(folder)[-2].parent.name.removeprefix("epoch-")) + 1
    content = bytearray(newest.read_bytes())
    if harm == "flipped":
        content[len(content) // 2] ^= 1
    newest.write_bytes({"truncated": content[:999], "flipped": content, "empty": b""}[harm])
    code, printed = project.run(folder, *STANDARD, "--out=out")
    assert code == 0 and resumed(printed) == before, printed
    # A narrow screen breaks the line at any word.
    assert f"{newest.parent.name}isdamagedandwaspassedover" in "".join(printed.split())
    assert sha256(folder / "out/weights.safetensors") == sha256(undisturbed)


def test_a_shard_altered_without_a_change_of_size_and_time_is_detected(folder: Path) -> None:
    """DVC, which compares size and time, does not detect it."""
    part = folder / "data/train/part-00000.parquet"
    known, content = part.stat(), bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    os.utime(part, ns=(known.st_atime_ns, known.st_mtime_ns))
    code, printed = project.run(folder, *STANDARD, "--out=out")
    assert code == 3, printed
    assert "part-00000.parquet was altered" in printed and "Traceback" not in printed


def test_dvc_and_the_doctor_name_dvc_files_that_are_cut_short(
    folder: Path, reproduced: Path
) -> None:
    lock = reproduced / "dvc.lock"
    text = lock.read_text()
    try:
        lock.write_text(text[: text.index("- path:", len(text) // 3) + 4])
        code, printed = project.run(reproduced, "dvc", "status")
        assert code != 0 and "dvc.lock" in printed, printed
        code, printed = project.run(reproduced, sys.executable, "-m", "pipelines", "doctor")
        assert code == 4 and "dvc.lock is cut short" in printed, printed
    finally:
        lock.write_text(text)
    running = reproduced / ".dvc/tmp/rwlock"
    running.write_text("")
    code, printed = project.run(reproduced, "dvc", "repro", "-s", "prepare_data")
    assert code != 0 and "rwlock" in printed.lower(), printed
    code, printed = project.run(reproduced, sys.executable, "-m", "pipelines", "doctor")
    assert code == 4 and "rwlock is cut short: remove it" in printed, printed
    running.unlink()
    code, printed = project.run(reproduced, "dvc", "repro", "-s", "prepare_data")
    assert code == 0, printed
