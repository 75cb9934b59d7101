"""The example of a plugin, installed by pip as anyone installs it, goes through the whole line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import project
import pytest
from made_once import made_once
from PIL import Image
from ruamel.yaml import YAML

from pipelines.config import schema
from pipelines.errors import ConfigError

EXAMPLE = project.ROOT / "examples/limpid_example"
SECTION = """\
  # Ours.
  smooth:
    model: {kind: bilateral, radius: 1} # two numbers are learned
    objective: {kind: denoising, sigma_max: 0.2}
    training: *short
"""
JUDGED = """
import sys
import torch
import limpid
from components.data.image_set import read
from components.data.shards import shard_rows
from components.models.checkpoints import load
from components.models.identity import modules_of, sources
from pathlib import Path

classifier, purifier = load("models/standard"), load("models/smooth")
print(*sources(modules_of(purifier)))
data = read(Path("data/test"), shard_rows(Path("data/test"))[0])[torch.arange(48)]
verdict = limpid.evaluate(
    classifier, data.pixels(), data.labels, purifier=purifier, threat="linf:51/255", ladder="quick",
    out="judged",
)
print(verdict.robust_accuracy, Path("judged/report.html").is_file())
"""


def _install(folder: Path) -> None:
    # What is built beside the sources stays in a copy of them.
    shutil.copytree(EXAMPLE, folder / "source")
    command = (
        "-m pip install --quiet --disable-pip-version-check --no-index --no-deps "
        "--no-build-isolation --target"
    )
    subprocess.run(
        [sys.executable, *command.split(), "site-packages", "./source"], cwd=folder, check=True
    )


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pip has installed the example, and nothing else."""
    return made_once(tmp_path_factory, "example", _install) / "site-packages"


def run(folder: Path, site: Path, *words: str) -> tuple[int, str]:
    """Run Python in a project with the example installed."""
    path = os.pathsep.join([str(folder), str(site)])
    return project.run(folder, sys.executable, *words, PYTHONPATH=path)


def limpid(folder: Path, site: Path, *words: str) -> str:
    """Run a command of Limpid that succeeds, with the example installed; return what it prints."""
    code, printed = run(folder, site, "-m", "pipelines", *words)
    assert code == 0, printed
    return printed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project with a purifier of the example, which names no plugin yet."""
    folder = project.copy_to(tmp_path / "project")
    # All of Limpid has to lie in one place.
    shutil.copytree(project.ROOT / "limpid", folder / "limpid")
    text = (project.ROOT / "profiles/digits.yaml").read_text()
    text = text.replace("epochs: 20", "epochs: 4").replace("train_limit: null", "train_limit: 600")
    (folder / "params.yaml").write_text(text.replace("\nstudents:\n", f"{SECTION}\nstudents:\n"))
    return folder


def test_the_example_passes_its_own_tests(site: Path, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")
    path = os.pathsep.join([str(project.ROOT), str(site)])
    code, printed = project.run(
        tmp_path, sys.executable, "-m", "pytest", "-q", "tests", PYTHONPATH=path
    )
    assert code == 0, printed
    assert len((EXAMPLE / "limpid_example.py").read_text().splitlines()) <= 50


def test_a_purifier_of_a_plugin_is_named_trained_attacked_scored_and_used(
    folder: Path, site: Path
) -> None:
    before = (folder / "params.yaml").read_text()
    code, printed = run(folder, site, "-m", "pipelines", "train_purifier", "smooth")
    assert code == 2, printed
    assert "error: params.yaml: purifiers.smooth.model.plugin is missing, and limpid-ex" in printed
    assert "is installed: `limpid configure --plugins` writes it\n" in printed

    printed = limpid(folder, site, "configure", "--plugins")
    text = (folder / "params.yaml").read_text()
    pin = YAML(typ="safe").load(text)["purifiers"]["smooth"]["model"]["plugin"]
    assert pin.startswith("limpid-example 0.1.0 sha256-")
    added = f"{{kind: bilateral, plugin: {pin}, radius: 1}} # two numbers are learned"
    assert text == before.replace("{kind: bilateral, radius: 1} # two numbers are learned", added)
    assert "params.yaml is now what it was, with the plugins that are installed" in printed
    assert "now what it was" in limpid(folder, site, "configure", "--plugins")
    assert (folder / "params.yaml").read_text() == text

    limpid(folder, site, "prepare_data")
    limpid(folder, site, "train_classifier", "standard")
    # Its objective reads no pool.
    (folder / "pool").mkdir()
    assert "val_accuracy" in limpid(folder, site, "train_purifier", "smooth")
    code, printed = run(folder, site, "-c", JUDGED)
    assert code == 0, printed
    files, scored = printed.splitlines()[0], printed.splitlines()[-1].split()
    assert "limpid_example" in files.split(), "its code is what a defense is known by"
    assert 0 <= float(scored[0]) <= 1 and scored[1] == "True"
    grey = np.random.default_rng(0).integers(0, 256, (12, 9), dtype=np.uint8)
    Image.fromarray(grey).save(folder / "in.png")
    limpid(folder, site, "purify", "--model", "models/smooth", "in.png", "--out", "cleaned")
    with Image.open(folder / "cleaned/in.png") as image:
        assert image.size == (9, 12) and np.asarray(image).std() < grey.std()

    # With the plugin changed, or without it.
    changed = folder / "changed"
    shutil.copytree(site, changed)
    file = changed / "limpid_example.py"
    file.write_text(file.read_text().replace(".clamp(0, 1)", ".clamp(0, 0.9)"))
    purify = ("purify", "--model", "models/smooth", "in.png", "--out", "again")
    code, printed = run(folder, changed, "-m", "pipelines", *purify)
    assert code == 3 and "the plugin of its network names limpid-example 0.1.0" in printed, printed
    code, printed = run(folder, changed, "-m", "pipelines", "train_purifier", "smooth")
    assert code == 2 and f"smooth.model.plugin names {pin}, and limpid" in printed, printed
    with pytest.raises(ConfigError) as caught:
        schema.load(folder / "params.yaml")
    refused = str(caught.value)
    assert "purifiers.smooth.model: Input tag 'bilateral' found using 'kind'" in refused
    assert refused.endswith("; if it comes from a plugin, this Python lacks it: install it here")


@pytest.mark.slow
def test_a_changed_plugin_makes_its_stages_stale_and_no_other(folder: Path, site: Path) -> None:
    params = project.toy()
    params["purifiers"]["smooth"] = {
        "model": {"kind": "bilateral", "radius": 1},
        "objective": {"kind": "denoising", "sigma_max": 0.2},
        "training": params["purifiers"]["adversarial_teacher"]["training"],
    }
    params["defenses"]["smooth"] = {**params["defenses"]["koo"], "model": "smooth"}
    project.write_params(folder, params)
    limpid(folder, site, "configure", "--plugins")
    code, printed = run(folder, site, "-m", "dvc", "repro")
    # Two numbers do not make a good defense.
    assert "verdict" in printed and code in (0, 255), printed
    assert (folder / "reports/report.html").is_file()

    changed = folder.parent / "changed"
    shutil.copytree(site, changed)
    with (changed / "limpid_example.py").open("a") as file:
        file.write("# Changed.\n")
    limpid(folder, changed, "configure", "--plugins")
    code, printed = run(folder, changed, "-m", "dvc", "repro", "--dry", "--keep-going")
    stale = {
        line.split("'")[1] for line in printed.splitlines() if line.startswith("Running stage")
    }
    # All else that uses it depends on the folder that this one writes.
    assert stale == {"train_purifier@smooth"}
