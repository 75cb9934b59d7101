"""A copy of the project in a folder of its own, with parameters small enough for a test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import psutil
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
# What a user has in the environment and in the URL of a remote, and what must stay there.
CANARY = "s3cr3t-c4n4ry"
SECRETS = {"AWS_SECRET_ACCESS_KEY": CANARY, "HF_TOKEN": CANARY, "DATABASE_PASSWORD": CANARY}
COPIED = ("components", "pipelines", "profiles", ".dvc", "dvc.yaml", ".dvcignore", ".gitignore")


def copy_to(folder: Path) -> Path:
    """Copy the project and give it tiny parameters; return the folder."""
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


def base() -> dict:
    """Return the digits profile."""
    read: dict = YAML(typ="safe", pure=True).load((ROOT / "profiles/digits.yaml").read_text())
    return read


def tiny() -> dict:
    """Return the digits profile with one or two epochs, few images and few attacks."""
    params = base()
    params["data"] |= {"test": 60, "val": 60, "train_limit": 256, "test_limit": None}
    params |= {"rows_per_part": 30, "batch": 30}
    # Every stage that can have a Ray has one.
    params["resources"]["stages"] = {}
    # Two stages less for everybody to wait for.
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
        "model": "denoiser",
        "inference": {
            "kind": "apudae", "steps": 3, "rate": 0.02, "optimiser": "adam", "scaled": False,
            "target": "minimum", "noise_255": 0.0, "transform": None,
        },
        "ladder": {
            "classifier": ["pgd"], "direct": ["pgd"], "plain": ["pgd"], "detached": ["pgd"],
            "full": ["apgd_ce", "aware"],
        },
    }  # fmt: skip
    params["defenses"]["diffpure"] = {
        "model": "ddpm",
        "inference": {"kind": "diffpure", "t_star": 2, "sampler": "ddpm", "substeps": 2},
        "ladder": {"classifier": ["pgd"], "bpda": ["apgd_ce"], "short": ["apgd_ce"]},
    }
    params["attacks"]["apgd_t"] |= {"steps": 10, "targets": 2}
    params["attacks"]["apgd_ce"] |= {"steps": 30}
    params["attacks"]["pgd"] |= {"steps": 5, "step": 0.3}
    params["attacks"]["bim"] |= {"steps": 5, "step": 0.3}
    params["attacks"]["square"] |= {"queries": 20}
    params["scoring"] = {"select_draws": 12, "score_draws": 12, "shown": 2}
    params["checks"] = {"images": 30, "thorough": False}
    params["tuning"]["studies"]["student"] |= {"images": 20, "trials": 3, "grace": 1}
    params["tuning"]["studies"]["atop"] |= {"images": 20, "trials": 2}
    return params


def toy() -> dict:
    """Return the smallest parameters that still have a stage of almost every kind."""
    params = tiny()
    # Some of its stages with a Ray, some without.
    params["resources"]["stages"] = base()["resources"]["stages"]
    params["classifiers"] = {n: params["classifiers"][n] for n in ("standard", "unseen")}
    params["purifiers"] = {n: params["purifiers"][n] for n in ("adversarial_teacher",)}
    params |= {"students": {}, "atop": {}, "controls": {}}
    params["tuning"] = {"run": [], "studies": {}}
    params["attacks"] = {n: params["attacks"][n] for n in ("pgd", "apgd_ce")}
    full = {"full": ["pgd", "apgd_ce"]}
    params["baselines"] = {"none": {"classifier": "standard", "ladder": full}}
    ladder = {"classifier": ["pgd", "apgd_ce"], "bpda": ["pgd"], **full}
    params["defenses"] = {"koo": {"model": "adversarial_teacher", "ladder": ladder}}
    return params


def write_params(folder: Path, params: dict) -> None:
    """Write params.yaml."""
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(params, file)


def start(
    folder: Path, *command: str, to: TextIO | int = subprocess.PIPE, **environment: str
) -> subprocess.Popen[str]:
    """Start a command in the project with this interpreter first on the path; it prints `to`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # An installed Limpid must not stand in for the copy under test.
    # And a store that another test opened must not get its runs.
    inherited = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    # A plain shell stays between DVC and what it starts, unless that is told to take its place.
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
    """Whether a process goes on; one that nobody has asked for its exit code does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run(folder: Path, *command: str, **environment: str) -> tuple[int, str]:
    """Run a command to its end; return its exit code and all it printed."""
    process = start(folder, *command, **environment)
    printed, _ = process.communicate(timeout=500)
    return process.returncode, printed


def stage(folder: Path, module: str, /, **options: str) -> tuple[int, str]:
    """Run one stage as its DVC command would."""
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    return run(folder, sys.executable, "-m", "pipelines", module, *arguments)
