"""Networks of a user's own go through the stages by name, as ours do."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import project
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from components.attacks.sets import read_crafted
from components.data.shards import sha256
from pipelines.tasks import metrics

CODE = """
from torch import nn
from components.models.classifiers import SmallCnn


class Mine(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = SmallCnn(kind="small_cnn", width=width).build((1, 8, 8), 10)

    def forward(self, x):
        return {"logits": self.inner(x)}


def classifier(width):
    return Mine(width)
"""
BLUR = """
from torch import nn
from torch.nn import functional as F


class Blur(nn.Module):
    def forward(self, x):
        return 0.5 * x + 0.5 * F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def purifier():
    return Blur()
"""
ODD = """
import torch
from torch import nn


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = torch.rand(8, 8)

    def forward(self, x):
        return (0.5 * x + 0.5 * self.shift).clamp(0, 1)


def make():
    return Odd()
"""
FACTORY = """
from blur.net import purifier
from mine_code import classifier


def make():
    return classifier(16), purifier()
"""
LADDER = {"classifier": ["pgd"], "full": ["pgd"]}
EXTERNAL = {
    "mine": {
        "code": "mine_code.py", "factory": "mine_code:classifier", "arguments": {"width": 16},
        "weights": "mine.safetensors",
    },
    "blur": {
        "code": "blur", "factory": "blur.net:purifier", "arguments": {}, "weights": "blur",
    },
}  # fmt: skip


def params() -> dict[str, Any]:
    found = project.tiny()
    found["external"] = EXTERNAL
    found["baselines"] = {
        "none": {"classifier": "standard", "ladder": {"full": ["pgd", "apgd_t"]}},
        "alone": {"classifier": "mine", "ladder": {"full": ["pgd", "apgd_t"]}},
    }
    found["defenses"] = {
        "blurred": {
            "classifier": "mine", "model": "blur",
            "ladder": LADDER,
        }
    }  # fmt: skip
    found["controls"], found["published"] = {}, {}
    found["tuning"] = {"run": [], "studies": {}}
    found["resources"]["stages"] = {}
    found["resources"]["shards"] = project.NO_WORKERS
    return found


@pytest.fixture(scope="module")
def imported(reproduced: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with both networks imported; the classifier has the weights of ours."""
    folder = project.copy_with(
        reproduced, tmp_path_factory.mktemp("external") / "project", "data", "reports/selftest.json"
    )
    shutil.copytree(reproduced / "models", folder / "models")
    (folder / "mine_code.py").write_text(CODE)
    (folder / "blur").mkdir()
    (folder / "blur/__init__.py").write_text("")
    (folder / "blur/net.py").write_text(BLUR)
    ours = load_file(folder / "models/standard/weights.safetensors")
    save_file({f"inner.{n}": one for n, one in ours.items()}, folder / "mine.safetensors")
    project.write_params(folder, params())
    for name, one in EXTERNAL.items():
        code, printed = project.stage(
            folder, "import_model", name=name, code=str(one["code"]), weights=str(one["weights"])
        )
        assert code == 0, printed
    return folder


def test_its_card_says_what_was_found(imported: Path) -> None:
    card = json.loads((imported / "models/mine/config.json").read_text())
    ours = json.loads((imported / "models/standard/config.json").read_text())
    assert card["family"] == "classifier" and card["model"]["kind"] == "external"
    assert card["provenance"]["validation"] == ours["provenance"]["validation"]
    assert card["provenance"]["weights"] == sha256(imported / "mine.safetensors")
    blur = json.loads((imported / "models/blur/config.json").read_text())
    assert blur["family"] == "purifier" and blur["provenance"]["weights"] is None
    assert blur["model"]["differentiable"] and not blur["model"]["stochastic"]


def test_it_is_attacked_and_scored_by_name_as_ours_are(imported: Path, reproduced: Path) -> None:
    project.resolve(imported)
    common = {"val": "data/val", "test": "data/test", "classifier": "models/mine"}
    for name, of in (("none", "standard"), ("alone", "mine")):
        options = {**common, "classifier": f"models/{of}", "out": f"adversarial/{name}"}
        code, printed = project.stage(imported, "generate_baseline", name=name, **options)
        assert code == 0, printed
    code, printed = project.stage(
        imported, "generate_adversarial", name="blurred", **common, purifier="models/blur",
        out="adversarial/blurred",
    )  # fmt: skip
    assert code == 0, printed
    code, printed = project.stage(imported, "evaluate")
    assert code == 0, printed
    # The same weights behind another module: the same images, and the same scores.
    for attack in ("pgd", "apgd_t"):
        one, other = (
            read_crafted(imported / f"adversarial/{n}/full/{attack}") for n in ("none", "alone")
        )
        assert bool((one.images == other.images).all()), attack
    found = metrics.read(imported / "reports/metrics.json").defenses
    assert found["alone"].headline == found["none"].headline
    assert found["alone"].headline.accuracy < found["alone"].clean.accuracy
    blurred = found["blurred"]
    assert not blurred.stochastic and blurred.verdict is not None
    assert blurred.headline.accuracy <= blurred.rungs["full"].accuracy


def test_the_same_networks_from_the_shell_get_the_same_scores(
    imported: Path, tmp_path: Path
) -> None:
    """After the stages: image by image, on every set."""
    for name in ("mine_code.py", "mine.safetensors"):
        shutil.copy(imported / name, tmp_path)
    shutil.copytree(imported / "blur", tmp_path / "blur")
    (tmp_path / "factory.py").write_text(FACTORY)
    attacks = params()["attacks"]
    ladder = {rung: {n: attacks[n] for n in some} for rung, some in LADDER.items()}
    YAML(typ="safe").dump(ladder, tmp_path / "ladder.yaml")
    code, printed = project.run(
        tmp_path, sys.executable, "-m", "limpid", "attack", "factory:make", "--out", "out",
        f"--data={imported / 'data/test'}", f"--validation={imported / 'data/val'}",
        "--threat=linf:51/255", "--ladder=ladder.yaml", "--batch=30",
        "--weights=classifier=mine.safetensors", PYTHONPATH=f"{project.ROOT}:{tmp_path}",
    )  # fmt: skip
    assert code in (0, 5) and "Traceback" not in printed, printed
    ours, theirs = imported / "reports/scores.parquet", tmp_path / "out/scores.parquet"
    there, here = counts(ours, "blurred"), counts(theirs, "defense")
    assert there and there.keys() == here.keys()
    for name, right in there.items():
        assert right == here[name], name
    some = [0 < sum(right) < len(right) for right in there.values()]
    assert any(some)


def counts(path: Path, defense: str) -> dict[str, list[int]]:
    """Return how often each image was right, by role, rung and attack."""
    found: dict[str, list[int]] = {}
    for row in sorted(pq.read_table(path).to_pylist(), key=lambda row: row["id"]):
        if row["defense"] == defense:
            name = f"{row['role']} {row['mode']}/{row['attack']}"
            found.setdefault(name, []).append(row["correct"])
    return found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"external": {"mine": {**EXTERNAL["mine"], "factory": "mine"}}}, "factory"),
        *(
            ({"external": {"mine": {**EXTERNAL["mine"], key: given}}}, f"mine.{key}: a path here")
            for key in ("code", "weights")
            for given in ("my code.py", "mine\t", "")
        ),
        ({"external": {**EXTERNAL, "standard": EXTERNAL["mine"]}}, "share the name standard"),
        (
            {"defenses": {"blurred": {**params()["defenses"]["blurred"], "model": "blurr"}}},
            "did you mean blur?",
        ),
        (
            {"defenses": {"blurred": {**params()["defenses"]["blurred"], "model": "mine"}}},
            "the purifier here and a classifier elsewhere",
        ),
    ],
)  # fmt: skip
def test_a_wrong_section_ends_in_one_sentence(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    from pipelines.config import schema
    from pipelines.errors import ConfigError

    project.write_params(tmp_path, {**params(), **change})
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")) as caught:
        schema.load(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)


def test_code_in_a_model_folder_runs_where_it_is_trusted(imported: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (12, 9), dtype=np.uint8)
    Image.fromarray(grey).save(imported / "in.png")
    words = [sys.executable, "-m", "pipelines", "purify", "--model", "models/blur", "in.png"]
    code, printed = project.run(imported, *words, "--out", "cleaned")
    assert code == 2 and "say --trust-code if you trust it" in printed
    code, printed = project.run(imported, *words, "--trust-code", "--out", "cleaned")
    assert code == 0, printed
    with Image.open(imported / "cleaned/in.png") as image:
        assert np.asarray(image).std() < grey.std()


def test_a_function_that_makes_another_network_each_time_is_refused(imported: Path) -> None:
    (imported / "odd_code.py").write_text(ODD)
    document = params()
    document["external"]["odd"] = {**EXTERNAL["blur"], "factory": "odd_code:make"}
    project.write_params(imported, document)
    code, printed = project.stage(
        imported, "import_model", name="odd", code="odd_code.py", weights="odd_code.py"
    )
    assert code == 2 and "makes another network at every call" in printed
    assert not (imported / "models/odd").exists()


@pytest.mark.parametrize("version", ["standard", "rand"])
def test_attacks_on_an_external_classifier_may_be_for_random_ones_or_for_others(
    tmp_path: Path, version: str
) -> None:
    """Whether it draws noise is known when it is imported; its norm is known before."""
    from pipelines.config import schema
    from pipelines.errors import ConfigError

    given, ladder = params(), {"full": ["pgd", "apgd_t", "aa"]}
    given["attacks"]["aa"] = {"kind": "autoattack", "version": version}
    given["baselines"]["alone"]["ladder"] = ladder
    given["defenses"]["blurred"]["ladder"] = {**ladder, "classifier": ["aa"]}
    project.write_params(tmp_path, given)
    schema.load(tmp_path / "params.yaml")
    given["attacks"]["aa"] = {
        "kind": "flip", "at": 0.5, "steps": 1, "candidates": 1, "eot": 1,
        "threat": {"norm": "l2", "eps_l2": 1.0},
    }  # fmt: skip
    project.write_params(tmp_path, given)
    with pytest.raises(ConfigError, match="ladder of alone names aa on the rung full: flip is for"):
        schema.load(tmp_path / "params.yaml")


def test_code_that_fails_ends_in_one_sentence(imported: Path) -> None:
    code, printed = project.stage(
        imported, "import_model", name="mine", code="blur", weights="mine.safetensors",
        out="models/broken",
    )  # fmt: skip
    assert code == 2 and "Traceback" not in printed
    assert "the code has no module mine_code; it has blur" in printed
    assert not (imported / "models/broken").exists()
