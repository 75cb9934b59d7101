"""SIGKILL at a random moment of a line; then one plain `dvc repro` must end in the same metrics.

`python benchmarks/crash.py --rounds 50` runs the smallest line undisturbed, then again and again in
folders of their own. In every round DVC, or DVC with all it started, is killed at a moment drawn
from the time the line takes; then `dvc repro` must end with byte-identical data, models, sets,
metrics and scores, and no process of the killed run may be there 15 s after (a lock keeps a second
writer out until then). DVC writes `dvc.lock` in place: where it was killed in the middle of that,
it refuses the file, and what the doctor says is done, and told. Ends with 1 if any of it fails;
prints a line a round. `--until STAGE` does with the stages up to that one.
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
    """What came of one kill."""

    moment: float
    whole: bool
    stage: str
    same: bool
    orphans: list[str]
    code: int
    doctor: bool

    @property
    def good(self) -> bool:
        """Whether nothing was lost and nothing left."""
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
    """Kill the line at a moment, run it again, and look."""
    make(folder)
    with (folder.parent / f"{folder.name}.txt").open("w") as printed:
        process = project.start(folder, *command, to=printed)
        time.sleep(moment)
        stage = running(folder)
        if process.poll() is None:
            (os.killpg if whole else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        before = {one: " ".join(words(one))[:200] for one in ours(folder)}
        began = time.monotonic()
        again = project.start(folder, *command, to=printed)
        while any(map(project.lives, before)) and time.monotonic() - began < ORPHAN_S:
            time.sleep(0.5)
        orphans = [title for process, title in before.items() if project.lives(process)]
        code = again.wait()
    doctor = bool(code) and cut_short(folder)
    if doctor:
        (folder / "dvc.lock").unlink()
        code, _ = project.run(folder, *command)
    return Round(moment, whole, stage, digest(folder) == wanted, orphans, code, doctor)


def cut_short(folder: Path) -> bool:
    """Ask the doctor whether `dvc.lock` is, which it then says to remove."""
    return (
        "dvc.lock is cut short"
        in project.run(folder, sys.executable, "-m", "pipelines", "doctor")[1]
    )


def make(folder: Path) -> None:
    """Make the project with the smallest parameters."""
    project.copy_to(folder)
    project.write_params(folder, project.toy())


def digest(folder: Path) -> str:
    """Return the sha256 of all that the line makes and counts."""
    total = hashlib.sha256()
    for path in sorted(
        path for name in MADE for path in (folder / name, *(folder / name).rglob("*"))
    ):
        if path.is_file():
            total.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
            total.update(path.read_bytes())
    return total.hexdigest()


def ours(folder: Path) -> list[psutil.Process]:
    """Return the processes that work in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def words(process: psutil.Process) -> list[str]:
    """Return the command line of a process, if it is still there."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def running(folder: Path) -> str:
    """Return the stage that runs."""
    for process in ours(folder):
        said = words(process)
        found = [word for word in said if word.startswith("pipelines.")]
        if found and found != ["pipelines.tracking.uploader"]:
            name = said[said.index("--name") + 1] if "--name" in said else ""
            return f"{found[0].removeprefix('pipelines.')} {name}".strip()
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
