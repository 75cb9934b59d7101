"""The whole line on tiny real data, run as a user runs it: what it makes and what it refuses."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import project
import pyarrow.parquet as pq
import pytest
import torch

from components.attacks.sets import read_crafted
from components.data import image_set
from components.data.digests import digest
from components.data.shards import sha256
from components.models.checkpoints import load, read_card, save
from components.models.purifiers.apudae import Apudae
from pipelines import layout

TRAIN = {option: layout.STAGES["train_classifier"][option] for option in ("train", "val")}
EVALUATE = layout.STAGES["evaluate"]
# What `evaluate` reads.
INPUTS = ("data", "models", "ladders", "adversarial", EVALUATE["selftest"])


@pytest.fixture
def metrics(reproduced: Path) -> dict:
    return json.loads((reproduced / "reports/metrics.json").read_text())


def test_every_entry_has_scores_and_the_headline_is_the_lowest(metrics: dict) -> None:
    params = project.tiny()
    names = [*params["baselines"], *params["defenses"], *params["controls"]]
    assert sorted(metrics["defenses"]) == sorted(names)
    for name, found in metrics["defenses"].items():
        assert found["headline"]["n"] == 60, name
        # The headline is the worst of everything, the clean images included.
        rungs = [rung["accuracy"] for rung in found["rungs"].values()]
        if not found["stochastic"]:
            assert found["headline"]["accuracy"] == pytest.approx(min(rungs)), name
            assert found["headline"]["accuracy"] <= found["clean"]["accuracy"]


def test_the_metrics_agree_with_the_table_of_scores(reproduced: Path, metrics: dict) -> None:
    rows = pq.read_table(reproduced / "reports/scores.parquet").to_pylist()
    right = [
        row["correct"] / row["draws"]
        for row in rows
        if (row["defense"], row["mode"], row["attack"], row["role"])
        == ("none", "full", "pgd", "score")
    ]
    assert len(right) == 60
    assert sum(right) / 60 == metrics["defenses"]["none"]["attacks"]["full/pgd"]["accuracy"]


def test_the_headline_of_every_entry_is_in_the_table_of_scores(
    reproduced: Path, metrics: dict
) -> None:
    table = pq.read_table(reproduced / "reports/scores.parquet")
    test = image_set.read(reproduced / "data/test")
    assert table.schema.metadata[b"images"].decode() == digest(test)
    for name, found in metrics["defenses"].items():
        right = [
            row["correct"] / row["draws"]
            for row in table.to_pylist()
            if (row["defense"], row["attack"], row["role"]) == (name, "robust", "score")
        ]
        assert len(right) == 60
        assert sum(right) / 60 == pytest.approx(found["headline"]["accuracy"], abs=1e-12), name


def test_stored_examples_stay_within_the_threat(reproduced: Path) -> None:
    clean = image_set.read(reproduced / "data/test").pixels().double()
    eps = project.tiny()["threat"]["eps_255"] / 255
    seen = 0
    for folder in (reproduced / "adversarial").glob("*/*/*"):
        if folder.is_dir() and folder.name != "cw" and "controls" not in str(folder):
            crafted = read_crafted(folder)
            far = (crafted.images.double() - clean).abs().max().item()
            assert far <= eps + 1e-6, folder
            seen += 1
    assert seen > 10


def test_a_second_run_does_nothing(reproduced: Path) -> None:
    started = time.monotonic()
    code, printed = project.run(reproduced, "dvc", "repro")
    assert code == 0
    assert "Running stage" not in printed
    assert time.monotonic() - started < 20


def test_one_more_attack_crafts_only_itself(reproduced: Path, tmp_path: Path) -> None:
    folder = project.copy_with(reproduced, tmp_path / "project", "data", "models")
    sets = folder / ".limpid/sets"
    shutil.copytree(reproduced / ".limpid/sets", sets)
    before = {path: path.stat().st_mtime_ns for path in sets.glob("*/*")}
    params = project.tiny()
    params["attacks"]["pgd3"] = {**params["attacks"]["pgd"], "steps": 3}
    known = params["baselines"]["none"]["ladder"]["full"]
    params["baselines"]["none"]["ladder"] = {"full": [*known, "pgd3"]}
    project.write_params(folder, params)
    project.resolve(folder)
    code, printed = project.stage(
        folder, "generate_baseline", name="none", val="data/val", test="data/test",
        classifier="models/standard", out="again",
    )  # fmt: skip
    assert code == 0, printed
    after = {path: path.stat().st_mtime_ns for path in sets.glob("*/*")}
    assert all(after[path] == when for path, when in before.items())
    assert len(after) - len(before) == 4  # two shards of two sets: the last iterate, the first hit
    made = {path.name for path in (folder / "again/full").iterdir()}
    assert made == {*known, "pgd_stop", "bim_stop", "pgd3", "pgd3_stop"}


def test_sets_do_not_depend_on_the_number_of_workers(reproduced: Path, tmp_path: Path) -> None:
    folder = project.copy_with(reproduced, tmp_path / "project", "data", "models")
    params = project.tiny()
    assert params["resources"]["shards"]["workers"] == 2
    assert "generate_adversarial@atop" not in params["resources"]["stages"]
    params["resources"]["shards"] = project.NO_WORKERS
    project.write_params(folder, params)
    project.resolve(folder)
    code, printed = project.stage(
        folder, "generate_adversarial", name="atop", val="data/val", test="data/test",
        classifier="models/standard", purifier="models/atop", out="adversarial/atop",
    )  # fmt: skip
    assert code == 0, printed
    made = sorted((folder / "adversarial/atop").rglob("*.*"))
    assert len(made) > 4
    for path in made:
        assert sha256(path) == sha256(reproduced / path.relative_to(folder)), path.name


def test_scores_do_not_depend_on_whether_there_are_workers(
    reproduced: Path, tmp_path: Path
) -> None:
    folder = project.copy_with(reproduced, tmp_path / "project", *INPUTS)
    params = project.tiny()
    params["resources"]["shards"] = project.NO_WORKERS
    project.write_params(folder, params)
    code, printed = project.stage(folder, "evaluate", **EVALUATE)
    assert code == 0, printed
    for name in ("metrics.json", "scores.parquet"):
        assert sha256(folder / "reports" / name) == sha256(reproduced / "reports" / name)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.faults), 2])
def test_training_on_ray_workers(reproduced: Path, tmp_path: Path, workers: int) -> None:
    """One worker gives the weights of in-process training; two train on the same global batch."""
    folder = project.copy_with(reproduced, tmp_path / "project", "data")
    params = project.tiny()
    params["resources"]["train"]["workers"] = workers
    project.write_params(folder, params)
    code, printed = project.stage(folder, "train_classifier", name="standard", out="out", **TRAIN)
    assert code == 0, printed
    made, known = folder / "out", reproduced / "models/standard"
    if workers == 1:
        name = "weights.safetensors"
        assert sha256(made / name) == sha256(known / name)
    test = image_set.read(reproduced / "data/test")
    right = (load(made)(test.pixels()).argmax(1) == test.labels).float().mean().item()
    assert right > 0.6
    assert read_card(made).provenance["validation"]["n"] == 60


def test_a_registered_defense_computes_what_was_attacked(reproduced: Path) -> None:
    script = """
import sys, json, mlflow, numpy as np
mlflow.set_tracking_uri("sqlite:///mlflow.db")
client = mlflow.MlflowClient()
versions = client.search_model_versions("name='limpid-digits'")
tags = {v.tags["defense"]: v for v in versions}
aliases = client.get_registered_model("limpid-digits").aliases
chosen = [v.tags["standing"] for v in versions if v.version == aliases.get("candidate")]
x = np.random.default_rng(0).random((4, 1, 8, 8), dtype=np.float32)
def ask(name):
    model = mlflow.pyfunc.load_model(f"models:/limpid-digits/{tags[name].version}")
    return model.predict(x)["logits"].tolist()
print(json.dumps([sorted(tags), tags["student_grey"].description,
                  chosen, ask("student_grey"), ask("apudae")]))
"""
    code, printed = project.run(reproduced, sys.executable, "-W", "ignore", "-c", script)
    assert code == 0, printed
    names, words, chosen, logits, descended = json.loads(printed.strip().splitlines()[-1])
    assert names == ["apudae", "atop", "diffpure", "student_adaptive", "student_grey"]
    assert not set(chosen) & {"broken", "no better than a control", "not measured"}
    assert "of 60 clean test images" in words
    x = torch.from_numpy(np.random.default_rng(0).random((4, 1, 8, 8), dtype=np.float32))
    purifier = load(reproduced / "models/student_grey")
    direct = load(reproduced / "models/standard")(purifier(x))
    assert torch.equal(direct, torch.tensor(logits))
    section = project.tiny()["defenses"]["apudae"]["inference"]
    apudae = Apudae.model_validate(section).wrap(load(reproduced / "models/denoiser"))
    with torch.no_grad():
        purified = apudae(x)
    assert torch.equal(load(reproduced / "models/standard")(purified), torch.tensor(descended))


@pytest.fixture(scope="module")
def trained_again(
    reproduced: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str], list[Path]]:
    """The standard classifier trained twice more, first without a tracking server: the project,
    what the stages printed, and the spool files after the first.
    """
    folder = project.copy_with(reproduced, tmp_path_factory.mktemp("again") / "project", "data")
    command = [sys.executable, "-m", "pipelines", "train_classifier", "--name=standard"]
    command += [f"--{option}={path}" for option, path in TRAIN.items()]
    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    code, first = project.run(folder, *command, "--out=first", **away)
    assert code == 0, first
    spooled = list((folder / ".limpid/spool").glob("*.jsonl"))
    assert all('"event": "end"' in path.read_text() for path in spooled)
    code, second = project.run(folder, *command, "--out=second")
    assert code == 0, second
    return folder, [first, second], spooled


def test_the_same_seed_trains_the_same_model(
    reproduced: Path, trained_again: tuple[Path, list[str], list[Path]]
) -> None:
    for out in ("first", "second"):
        for name in ("weights.safetensors", "config.json", "history.json"):
            made = trained_again[0] / out / name
            assert sha256(made) == sha256(reproduced / "models/standard" / name)


def test_an_unreachable_tracking_server_fails_no_stage(
    trained_again: tuple[Path, list[str], list[Path]],
) -> None:
    _, printed, spooled = trained_again
    assert "the run is kept" in printed[0] and len(spooled) == 1
    # The next stage that reached a store uploaded what was kept.
    assert "the run is kept" not in printed[1] and not spooled[0].exists()


def few_defenses(*names: str) -> dict:
    """Return parameters with one baseline, these defenses, no controls and no Ray."""
    params = project.tiny()
    params["defenses"] = {name: params["defenses"][name] for name in names}
    params |= {"controls": {}, "tuning": {"run": [], "studies": {}}}
    params["resources"]["shards"] = project.NO_WORKERS
    return params


def test_an_altered_set_is_never_scored(reproduced: Path, tmp_path: Path) -> None:
    folder = project.copy_with(
        reproduced, tmp_path / "project", "data", "models", EVALUATE["selftest"]
    )
    shutil.copytree(reproduced / "adversarial", folder / "adversarial")
    project.write_params(folder, few_defenses("student_grey"))
    project.resolve(folder)
    part = folder / "adversarial/none/full/pgd/part-00000.parquet"
    os.chmod(part, 0o644)
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    code, printed = project.stage(folder, "evaluate", **EVALUATE)
    assert code == 3, printed
    assert "part-00000.parquet" in printed
    assert "Traceback" not in printed
    assert not (folder / "reports/metrics.json").exists()


def test_a_missing_input_is_reported_in_one_sentence(tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "project")
    code, printed = project.stage(folder, "train_classifier", name="standard", out="out", **TRAIN)
    assert code == 3
    assert printed.strip().count("\n") == 0
    assert "data/train is missing" in printed


def test_a_set_crafted_against_another_model_is_not_counted(
    reproduced: Path, tmp_path: Path
) -> None:
    folder = project.copy_with(
        reproduced, tmp_path / "project", "data", "models", EVALUATE["selftest"]
    )
    shutil.copytree(reproduced / "adversarial", folder / "adversarial")
    mine = folder / "adversarial/student_adaptive/full/pgd"
    shutil.rmtree(mine)
    shutil.copytree(folder / "adversarial/student_grey/full/pgd", mine)
    # The same denoiser used in another way is another defense.
    params = few_defenses("student_adaptive", "apudae")
    params["defenses"]["apudae"] |= {"inference": None, "ladder": {"full": ["apgd_ce"]}}
    project.write_params(folder, params)
    project.resolve(folder)
    code, printed = project.stage(folder, "evaluate", **EVALUATE)
    assert code == 0, printed
    metrics = json.loads((folder / "reports/metrics.json").read_text())
    bare = metrics["defenses"]["apudae"]
    assert "provenance/full/apgd_ce" in bare["checks"]["blocking_failed"]
    found = metrics["defenses"]["student_adaptive"]
    assert "provenance/full/pgd" in found["checks"]["blocking_failed"]
    assert "full/pgd" not in found["attacks"] and found["headline"]["upper_bound"]
    code, printed = project.stage(folder, "verdict", metrics="reports/metrics.json")
    assert code == 5 and "student_adaptive" in printed


def test_a_classifier_of_other_classes_is_refused_before_training(
    reproduced: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    card = read_card(reproduced / "models/standard")
    strange = card.model_copy(update={"class_names": ["ship", *card.class_names[1:]]})
    save(other, load(reproduced / "models/standard"), strange)
    code, printed = project.stage(
        reproduced, "train_purifier", name="normal_teacher", classifier=str(other), pool="pool",
        out=str(tmp_path / "out"), **TRAIN,
    )  # fmt: skip
    assert code == 2, printed
    assert "ship" in printed and "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_every_result_has_a_certificate_of_its_gradient(metrics: dict) -> None:
    for name in ("none", "student_adaptive", "atop"):
        certificate = metrics["defenses"][name]["certificate"]
        assert certificate["gradient_present/full"]["unusable"] <= 0.01
        assert certificate["gradient_honest/full"]["wrong"] <= 1
        assert ("eot_agreement" in certificate) == (name == "atop")


def test_defenses_name_the_rivals_they_do_not_beat(metrics: dict) -> None:
    rivals = {*project.tiny()["controls"], *project.tiny()["baselines"]}
    for name in project.tiny()["defenses"]:
        found = metrics["defenses"][name]["not_better_than"]
        assert set(found) <= rivals
        assert all(rival["p"] >= 0.01 for rival in found.values())


def test_purifiers_that_descend_are_scored_through_their_stand_ins(
    reproduced: Path, metrics: dict
) -> None:
    found = metrics["defenses"]["apudae"]
    assert set(found["rungs"]) == {"classifier", "network", "direct", "plain", "detached", "full"}
    assert found["white_box"]["accuracy"] <= found["rungs"]["direct"]["accuracy"]
    named = {finding["name"]: finding for finding in found["checks"]["findings"]}
    assert named["stand_ins"]["passed"] and "direct" in named["stand_ins"]["detail"]
    assert metrics["defenses"]["diffpure"]["stochastic"]
    failed = metrics["defenses"]["diffpure"]["checks"]["blocking_failed"]
    assert "full_rung" not in failed and "strong_attack" not in failed
    card = read_card(reproduced / "models/ddpm")
    assert "validation" not in card.provenance, "a generative network answers nothing"


def test_a_denoiser_stores_the_statistics_of_clean_errors(reproduced: Path) -> None:
    denoiser = load(reproduced / "models/denoiser")
    clean = image_set.read(reproduced / "data/train").pixels()
    with torch.no_grad():
        errors = denoiser.error(clean)
    assert torch.allclose(denoiser.clean_mean, errors.mean(), rtol=1e-4)
    assert torch.allclose(denoiser.clean_std, errors.std(), rtol=1e-4)


def test_every_purifier_that_changes_images_is_scored_as_a_detector(metrics: dict) -> None:
    assert metrics["defenses"]["none"]["detection"] is None
    for name in ("apudae", "student_adaptive", "diffpure"):
        found = metrics["defenses"][name]["detection"]
        assert found["validation"] == 60
        assert set(found["attacks"]) == set(metrics["defenses"][name]["attacks"])
        headline = metrics["defenses"][name]["headline"]["accuracy"]
        # Rejecting never lowers the accuracy, up to the noise that selects.
        assert found["detect_or_correct"]["5"]["accuracy"] >= headline - 0.05
        assert all(0 <= wrong <= 1 for _, wrong in found["curve"])


def test_a_stand_in_the_purifier_lacks_is_refused_before_anything_is_crafted(
    reproduced: Path, tmp_path: Path
) -> None:
    params = project.tiny()
    params["controls"]["bit_depth"]["ladder"]["short"] = ["pgd"]
    folder = project.copy_with(reproduced, tmp_path / "project", "data", "models")
    project.write_params(folder, params)
    project.resolve(folder)
    code, printed = project.stage(
        folder,
        "generate_controls",
        name="bit_depth",
        val="data/val",
        test="data/test",
        classifier="models/standard",
        out="out",
    )
    assert code == 2 and "Traceback" not in printed
    assert "ladder of bit_depth names short, but this purifier's stand-ins are soft" in printed
    assert not (folder / "out").exists()
