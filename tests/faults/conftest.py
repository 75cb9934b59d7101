"""Shared by the fault tests: a project whose training takes long enough to be disturbed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import project
import pytest

TRAIN = ["--train=data/train", "--val=data/val"]
STANDARD = [sys.executable, "-m", "pipelines", "train_classifier", "--name=standard", *TRAIN]


def states(folder: Path) -> list[Path]:
    """Return the manifests of the states of trainings, oldest first."""
    return sorted(folder.glob(".limpid/work/*/states/epoch-*/manifest.json"))


@pytest.fixture
def folder(reproduced: Path, tmp_path: Path) -> Path:
    """A project with data, whose standard classifier trains for 60 epochs."""
    made = project.copy_to(tmp_path / "project")
    shutil.copytree(reproduced / "data", made / "data")
    params = project.tiny()
    training = params["classifiers"]["standard"]["training"]
    params["classifiers"]["standard"]["training"] = {**training, "epochs": 60}
    project.write_params(made, params)
    return made


@pytest.fixture(scope="session")
def undisturbed(reproduced: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of that classifier when nothing disturbs its training."""
    made = project.copy_to(tmp_path_factory.mktemp("undisturbed") / "project")
    os.symlink(reproduced / "data", made / "data")
    params = project.tiny()
    training = params["classifiers"]["standard"]["training"]
    params["classifiers"]["standard"]["training"] = {**training, "epochs": 60}
    project.write_params(made, params)
    code, printed = project.run(made, *STANDARD, "--out=out")
    assert code == 0, printed
    return made / "out/weights.safetensors"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path, str], None]]:
    """Return a function that mounts a disk of some size at a path, or changes the size of it."""
    mounted: list[Path] = []

    def mount(path: Path, size: str) -> None:
        if path in mounted:
            command = ["mount", "-o", f"remount,size={size}", str(path)]
        else:
            path.mkdir(parents=True, exist_ok=True)
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted: {done.stderr.strip()}")
        if path not in mounted:
            mounted.append(path)

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=False)
