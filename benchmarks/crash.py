"""SIGKILL at a random moment of a line; then one plain `dvc repro` must end in the same metrics.

`python benchmarks/crash.py --rounds 50` runs the smallest line undisturbed, then again and again in
new folders. Each round kills DVC, or DVC with all the processes it started, at a random moment.
Then `dvc repro` must end with byte-identical data, models, sets, metrics and scores, and no process
of the killed run may live for longer than 15 s (a lock keeps a second writer out until then). DVC
writes `dvc.lock` in place, and refuses the file if it was killed while it wrote: then the script
does what `limpid doctor` says, and the round is marked. Prints a line for each round, and ends with
1 if a round fails. `--until STAGE` runs the stages up to that one.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import project

ORPHAN_S = 15
MADE = ("data", "models", "pool", "adversarial", "reports/metrics.json", "reports/scores.parquet")


@dataclass(frozen=True)
class Round:
    """The outcome of one kill."""

    moment: float
    whole: bool
    stage: str
    same: bool
    orphans: list[str]
    code: int
    doctor: bool

    @property
    def good(self) -> bool:
        """Whether no result was lost and no process left."""
        return self.same and self.code == 0 and not self.orphans


def undisturbed(folder: Path, command: list[str]) -> tuple[str, float]:
    """Run the line; return the digest of its results and the seconds it took."""
    make(folder)
    began = time.monotonic()
    code, printed = project.run(folder, *command)
    if code:
        raise SystemExit(f"the line does not even run undisturbed:\n{printed[-2000:]}")
    return digest(folder), time.monotonic() - began


def disturbed(folder: Path, command: list[str], wanted: str, moment: float, whole: bool) -> Round:
    """Kill the line at a moment, run it again, and compare."""
    make(folder)
    with (folder.parent / f"{folder.name}.txt").open("w") as printed:
        process = project.start(folder, *command, to=printed)
        time.sleep(moment)
        stage = running(folder)
        if process.poll() is None:
            (os.killpg if whole else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        before = {one: " ".join(command_line(one))[:200] for one in processes_in(folder)}
        began = time.monotonic()
        again = project.start(folder, *command, to=printed)
        while any(map(project.lives, before)) and time.monotonic() - began < ORPHAN_S:
            time.sleep(0.5)
        orphans = [title for process, title in before.items() if project.lives(process)]
        code = again.wait()
    doctor = bool(code) and lock_is_cut_short(folder)
    if doctor:
        (folder / "dvc.lock").unlink()
        code, _ = project.run(folder, *command)
    return Round(moment, whole, stage, digest(folder) == wanted, orphans, code, doctor)


def lock_is_cut_short(folder: Path) -> bool:
    """Return whether `limpid doctor` says that `dvc.lock` is cut short, and so to be removed."""
    _, printed = project.run(folder, sys.executable, "-m", "pipelines", "doctor")
    return "dvc.lock is cut short" in printed


def make(folder: Path) -> None:
    """Make the project with the smallest parameters."""
    project.copy_to(folder)
    project.write_params(folder, project.toy())


def digest(folder: Path) -> str:
    """Return the sha256 over all outputs of the line that must not change."""
    total = hashlib.sha256()
    for path in sorted(
        path for name in MADE for path in (folder / name, *(folder / name).rglob("*"))
    ):
        if path.is_file():
            total.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
            total.update(path.read_bytes())
    return total.hexdigest()


def processes_in(folder: Path) -> list[psutil.Process]:
    """Return the processes that work in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def command_line(process: psutil.Process) -> list[str]:
    """Return the command line of a process, empty if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def running(folder: Path) -> str:
    """Return the stage that runs, with its instance."""
    for process in processes_in(folder):
        # python -m pipelines STAGE [--name INSTANCE] ...
        words = command_line(process)
        if words[1:3] == ["-m", "pipelines"] and len(words) > 3:
            instance = words[words.index("--name") + 1] if "--name" in words else ""
            return f"{words[3]} {instance}".strip()
    return "between stages"


def main() -> int:
    """Run all rounds; return 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", default="", metavar="STAGE")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    home = Path(tempfile.mkdtemp(prefix="limpid-crash-"))
    command = ["dvc", "repro", *([given.until] if given.until else [])]
    wanted, seconds = undisturbed(home / "undisturbed", command)
    print(f"undisturbed: {seconds:.0f} s, {wanted[:12]}", flush=True)
    bad = doctor = 0
    for number in range(given.rounds):
        moment, whole = draw.uniform(0.5, seconds), draw.random() < 0.5
        found = disturbed(home / f"round{number}", command, wanted, moment, whole)
        bad += not found.good
        doctor += found.doctor
        print(
            f"{number + 1}/{given.rounds} killed {'all' if whole else 'dvc'} at {moment:.1f} s in "
            f"{found.stage}: same {found.same}, orphans {len(found.orphans)}, exit {found.code}"
            f"{' as the doctor says' if found.doctor else ''}"
            f"{'' if found.good else f'  <-- BAD {found.orphans}'}",
            flush=True,
        )
        if found.good:
            subprocess.run(["rm", "-rf", str(home / f"round{number}")], check=True)
    print(
        f"{given.rounds - bad} of {given.rounds} recovered, {doctor} of them as the doctor says; "
        f"undisturbed {seconds:.0f} s"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
