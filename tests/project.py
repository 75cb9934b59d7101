"""Copies of the project with parameters small enough for a test, and commands run in them."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

import psutil
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
# A secret of the user, in the environment and in the URL of the remote; it must not spread.
CANARY = "s3cr3t-c4n4ry"
SECRETS = {"AWS_SECRET_ACCESS_KEY": CANARY, "HF_TOKEN": CANARY, "DATABASE_PASSWORD": CANARY}
NO_WORKERS = {"workers": 0, "cpus": 1, "gpus": 0}
# Defenses whose examples are crafted without Ray.
ONE_PROCESS = ("student_grey", "student_adaptive", "apudae", "diffpure")
COPIED = ("components", "pipelines", "profiles", ".dvc", "dvc.yaml", ".dvcignore", ".gitignore")


def copy_to(folder: Path) -> Path:
    """Copy the project into a new folder, with tiny parameters and a git repository."""
    folder.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "tmp", "cache")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            shutil.copyfile(source, folder / name)
    write_params(folder, tiny())
    for command in (
        "init -q",
        f"remote add origin https://somebody:{CANARY}@example.org/project.git",
        "add -A",
        "-c user.name=somebody -c user.email=somebody@example.org commit -qm all",
    ):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    return folder


def copy_with(line: Path, folder: Path, *shared: str) -> Path:
    """Copy the project into a new folder that shares these outputs of a finished line."""
    copy_to(folder)
    for name in shared:
        (folder / name).parent.mkdir(exist_ok=True)
        os.symlink(line / name, folder / name)
    return folder


def base() -> dict:
    """Return the digits profile."""
    read: dict = YAML(typ="safe", pure=True).load((ROOT / "profiles/digits.yaml").read_text())
    return read


def tiny() -> dict:
    """Return the digits profile with one or two epochs, few images and few attacks."""
    params = base()
    params["data"] |= {"test": 60, "val": 60, "train_limit": 256, "test_limit": None}
    params |= {"rows_per_part": 30, "batch": 30}
    # Some stages use Ray workers; the others, which do the same with other models, start faster
    # without.
    without = {"shards": NO_WORKERS}
    params["resources"]["stages"] = {
        "generate_baseline": without,
        **{f"generate_adversarial@{name}": without for name in ONE_PROCESS},
    }
    # Two stages fewer to wait for.
    del params["classifiers"]["robust"], params["baselines"]["adversarial_training"]
    for section in ("classifiers", "purifiers", "students", "atop"):
        for entry in params[section].values():
            entry["training"] = {**entry["training"], "epochs": 6, "batch_size": 32}
            if entry.get("model", {}).get("kind") == "conv_autoencoder":
                entry["model"] = {**entry["model"], "width": 4}
    params["purifiers"]["masked"]["model"] = {
        **params["purifiers"]["masked"]["model"],
        "inner": params["purifiers"]["normal_teacher"]["model"],
    }
    params["classifiers"]["standard"]["training"] |= {"epochs": 8}
    # Purifiers that descend: one on a denoiser, one on a network that is no purifier by itself.
    short = {**params["purifiers"]["masked"]["training"], "learning_rate": 0.003}
    params["purifiers"]["denoiser"] = {
        "model": {"kind": "denoiser", "width": 8},
        "objective": {"kind": "denoising", "sigma_max": 0.2},
        "training": short,
    }
    params["purifiers"]["ddpm"] = {
        "model": {
            "kind": "ddpm", "width": 4, "steps": 20, "beta_start": 0.0001, "beta_end": 0.2,
            "centred": True, "norm_input": False,
        },
        "objective": {"kind": "noise_prediction"},
        "training": short,
    }  # fmt: skip
    params["attacks"]["aware"] = {
        "kind": "detector_aware", "sees": "classifier", "weights": [0.1], "steps": 5, "step": 0.3,
        "eot": 1,
    }  # fmt: skip
    params["defenses"]["apudae"] = {
        "classifier": "standard",
        "model": "denoiser",
        "inference": {
            "kind": "apudae", "steps": 3, "rate": 0.02, "optimiser": "adam", "scaled": False,
            "target": "minimum", "noise_255": 0.0, "transform": None,
        },
        "ladder": {
            "classifier": ["pgd"], "network": ["pgd"], "direct": ["pgd"], "plain": ["pgd"],
            "detached": ["pgd"], "full": ["apgd_ce", "apgd_dlr", "aware"],
        },
    }  # fmt: skip
    params["defenses"]["diffpure"] = {
        "classifier": "standard",
        "model": "ddpm",
        "inference": {"kind": "diffpure", "t_star": 2, "sampler": "ddpm", "substeps": 2},
        "ladder": {
            "classifier": ["pgd"], "bpda": ["apgd_ce", "apgd_dlr"],
            "short": ["apgd_ce", "apgd_dlr"],
        },
    }  # fmt: skip
    params["attacks"]["apgd_t"] |= {"steps": 10, "targets": 2}
    params["attacks"]["apgd_ce"] |= {"steps": 12}
    params["attacks"]["apgd_dlr"] |= {"steps": 10}
    params["attacks"]["pgd"] |= {"steps": 5, "step": 0.3}
    params["attacks"]["bim"] |= {"steps": 5, "step": 0.3}
    params["attacks"]["square"] |= {"queries": 100}
    params["scoring"] = {"select_draws": 12, "score_draws": 12, "shown": 2}
    params["checks"] = {"images": 32, "thorough": False}
    params["tuning"]["studies"]["student"] |= {"images": 20, "trials": 3, "grace": 1}
    params["tuning"]["studies"]["atop"] |= {"images": 20, "trials": 2}
    return params


def toy() -> dict:
    """Return the smallest parameters that keep a stage of almost every kind."""
    params = tiny()
    # Some stages with Ray, some without.
    params["resources"]["stages"] = base()["resources"]["stages"]
    params["classifiers"] = {n: params["classifiers"][n] for n in ("standard", "unseen")}
    params["purifiers"] = {n: params["purifiers"][n] for n in ("adversarial_teacher",)}
    params |= {"students": {}, "atop": {}, "controls": {}}
    params["tuning"] = {"run": [], "studies": {}}
    params["attacks"] = {n: params["attacks"][n] for n in ("pgd", "apgd_ce", "apgd_dlr")}
    full = {"full": ["pgd", "apgd_ce", "apgd_dlr"]}
    params["baselines"] = {"none": {"classifier": "standard", "ladder": full}}
    ladder = {"classifier": ["pgd", "apgd_ce"], "bpda": ["pgd"], **full}
    params["defenses"] = {
        "koo": {"classifier": "standard", "model": "adversarial_teacher", "ladder": ladder}
    }
    return params


def write_params(folder: Path, params: dict) -> None:
    """Write params.yaml."""
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(params, file)


def resolve(folder: Path) -> None:
    """Do what the stage `resolve_ladders` does, without another process."""
    # Imports torch.
    from pipelines.config import schema
    from pipelines.stages.resolve_ladders import LaddersParams, run

    out = folder / "ladders"
    shutil.rmtree(out, ignore_errors=True)
    run(LaddersParams.of(schema.load(folder / "params.yaml"), None), cast(Any, None), out=out)


def start(
    folder: Path, *command: str, to: TextIO | int = subprocess.PIPE, **environment: str
) -> subprocess.Popen[str]:
    """Start a command in the project, this interpreter first on its path; `to` gets its output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # A store that another test opened must not receive the runs.
    inherited = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    # PYTHONPATH: the copy under test, not an installed Limpid. SHELL: DVC starts stages through it.
    environment = {
        **inherited, "PATH": path, "PYTHONPATH": str(folder), "SHELL": "/bin/sh", **environment
    }  # fmt: skip
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=to,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def lives(process: psutil.Process) -> bool:
    """Whether a process still runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(true: Callable[[], object], seconds: float = 60) -> None:
    """Wait until a condition holds; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.05)


def descendants(pid: int, name: str) -> list[psutil.Process]:
    """Return the living descendants of a process whose name or command contains `name`."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if name in child.name() or name in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def resumed(printed: str) -> int:
    """Return after how many epochs a training says that it resumed; 0 where it did not."""
    found = re.findall(r"goes on after epoch (\d+)", printed)
    return int(found[-1]) if found else 0


def run(folder: Path, *command: str, **environment: str) -> tuple[int, str]:
    """Run a command to its end; return its exit code and its output."""
    process = start(folder, *command, **environment)
    try:
        printed, _ = process.communicate(timeout=900)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, printed


def stage(folder: Path, module: str, /, **options: str) -> tuple[int, str]:
    """Run one stage as its DVC command does."""
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    return run(folder, sys.executable, "-m", "pipelines", module, *arguments)


def lock_of(folder: Path, *names: str) -> None:
    """Write a dvc.lock that lists these files of a project as they are."""
    outs = [
        {"path": name, "hash": "md5", "md5": hashlib.md5((folder / name).read_bytes()).hexdigest()}
        for name in names
    ]
    YAML().dump({"stages": {"evaluate": {"outs": outs}}}, folder / "dvc.lock")
