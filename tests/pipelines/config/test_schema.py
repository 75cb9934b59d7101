"""Parameters: read strictly, refused in one sentence, composed from profiles."""

import subprocess
import sys
import time
from pathlib import Path

import project
import pytest
from ruamel.yaml import YAML

from pipelines.commands import configure
from pipelines.config import schema
from pipelines.config.resources import Resources
from pipelines.config.schema import Params
from pipelines.errors import ConfigError

ROOT = project.ROOT
TEXT = (ROOT / "profiles/digits.yaml").read_text()


def refusal(tmp_path: Path, text: str) -> str:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        schema.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_the_default_parameters_are_the_digits_profile() -> None:
    assert (ROOT / "params.yaml").read_text() == TEXT
    assert schema.load(ROOT / "params.yaml").threat.eps == 0.2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("eps_255: 51", "epss_255: 51", "did you mean eps_255?"),
        ("eps_255: 51", "eps_255: 0", "threat.eps_255"),
        ("eps_255: 51", "eps_255: -8", "greater than 0"),
        ("eps_255: 51", "eps_255: 300", "less than or equal to 255"),
        ("eps_255: 51", "eps_255: 8/255", "8/255"),
        ("eps_255: 51", "eps_255: .nan", "threat.eps_255"),
        ("eps_255: 51", "eps_255: true", "threat.eps_255"),
        ("norm: linf", "norm: linff", "did you mean linf?"),
        ("seed: 0", "seed: 0\nseed: 1", "duplicate key"),
        ("seed: 0", "seed: '0'", "seed"),
        ("seed: 0", "sed: 0", "did you mean seed?"),
        ("seed: 0", "\tseed: 0", "line"),
        ("seed: 0", "", "seed is missing"),
        ("seed: 0", "seed: [", "line"),
        ("kind: digits", "kind: digit", "did you mean digits?"),
        ("learning_rate: 0.003", "learning_rate: 0", "learning_rate"),
        ("learning_rate: 0.003", "learning_rate: 3e-3x", "learning_rate"),
        ("batch_size: 64", "batch_size: 1", "batch_size"),
        ("depth: 8", "depth: 9", "6n+2"),
        ("score_draws: 32", "score_draws: 48", "multiple of select_draws"),
        ("images: 128", "images: 8", "greater than or equal to 16"),
        ("full: [fgsm, pgd, apgd_ce]", "transfer: [pgd]", "surrogate"),
        ("strided: [2]", "strided: [7]", "1..4"),
        (
            "{kind: normal_teacher}",
            "{kind: wgan_gp, critic_steps: 5}",
            "wgan_gp trains a gan, not a",
        ),
        (
            "model: *autoencoder\n    objective: {kind: normal_teacher}",
            "model: {kind: gan, latent: 8, width: 4}\n    objective: {kind: normal_teacher}",
            "a gan is trained by wgan_gp, not by normal_teacher",
        ),
        (
            "{model: student_adaptive, ladder: *whole}",
            "{model: student_adaptive, ladder: *whole, inference: {kind: defense_gan, "
            "iterations: 5, restarts: 2, rate: 10}}",
            "defense_gan needs a model of kind gan, not conv_autoencoder",
        ),
        (
            "model: *autoencoder\n    objective: {kind: normal_teacher}",
            "model: {kind: gan, latent: 8, width: 4}\n"
            "    objective: {kind: wgan_gp, critic_steps: 5}",
            "names normal_teacher, a gan, which makes no image of an image",
        ),
        ("trials: {workers: 2", "trials: {workers: 0", "resources.trials.workers"),
        ("base: masked", "base: maskd", "did you mean masked?"),
        ("model: student_grey", "model: student_gray", "did you mean student_grey?"),
        ("full: [fgsm, pgd, apgd_ce]", "full: [fgms]", "did you mean fgsm?"),
        ("bpda: [pgd]\n      full: [fgsm, pgd, apgd_ce]", "bdpa: [pgd]", "bpda"),
        ("missing: 0.15", "missing: 1.5", "missing"),
        ("steps: 40, step: 0.1, restarts: 1", "steps: 0, step: 0.1, restarts: 1", "steps"),
        ("early_stop: true", "early_stop: no", "early_stop"),
        (
            "published: {}",
            "published: {student_gray: {source: a, accuracy: {clean: 0.9}}}",
            "did you mean student_grey?",
        ),
        (
            "published: {}",
            "published: {atop: {source: a, accuracy: {classifier/fgms: 0.9}}}",
            "published.atop.accuracy names classifier/fgms, which is not there, did you mean "
            "classifier/fgsm?",
        ),
        (
            "published: {}",
            "published: {atop: {source: a, accuracy: {clean: 98.7}}}",
            "less than or equal to 1",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in TEXT
    assert said in refusal(tmp_path, TEXT.replace(old, new, 1))


def test_resources_of_an_instance_come_before_those_of_its_stage() -> None:
    resources = schema.load().resources
    alone, other = ({"workers": n, "cpus": 1, "gpus": 0.0} for n in (0, 5))
    stages = {"generate_baseline": {"shards": alone}, "generate_baseline@b": {"shards": other}}
    known = Resources.model_validate({**resources.model_dump(), "stages": stages})
    names = ("generate_baseline@a", "generate_baseline@b", "evaluate")
    assert [known.of(name).shards.workers for name in names] == [0, 5, resources.shards.workers]


def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(TEXT.replace("learning_rate: 0.003", "learning_rate: 3e-3", 1))
    assert schema.load(path).classifiers["standard"].training.learning_rate == 0.003


def test_a_mistake_is_said_before_anything_starts(tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "project")
    (folder / "params.yaml").write_text(TEXT.replace("eps_255: 51", "epss_255: 51", 1))
    started = time.monotonic()
    code, printed = project.stage(
        folder, "prepare_data", out_train="data/train", out_val="data/val", out_test="data/test"
    )
    assert code == 2
    assert "did you mean eps_255?" in printed
    assert "Traceback" not in printed
    assert time.monotonic() - started < 30
    assert not (folder / "data").exists()


@pytest.mark.parametrize("profile", sorted(p.stem for p in (ROOT / "profiles").glob("*.yaml")))
def test_every_profile_is_whole(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    value = YAML(typ="safe", pure=True).load(configure.compose(profile, []))
    assert Params.model_validate(value).classifiers


def test_an_override_reaches_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = configure.compose(
        "mnist", ["data.kind=parquet", "data.path=some where", "attacks.pgd.steps=7"]
    )
    made = Params.model_validate(YAML(typ="safe", pure=True).load(text))
    assert made.data.kind == "parquet"
    assert made.data.path == "some where"
    # What both kinds of source know stays: how the splits are cut.
    assert made.data.val == 1000
    assert made.attacks["pgd"].steps == 7


@pytest.mark.parametrize(
    ("profile", "overrides", "said"),
    [
        ("mnis", [], "there are apudae-table2,"),
        ("digits", ["threat.eps_255"], "section.key=value"),
        ("digits", ["threat.eps_25=8"], "did you mean eps_255?"),
        ("digits", ["threat.eps_255=["], "not readable"),
    ],
)
def test_a_wrong_profile_or_override_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, profile: str, overrides: list[str], said: str
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        configure.compose(profile, overrides)


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ([], True),
        (["data.kind=mnist"], True),
        (["data.kind=parquet", "data.path=here"], True),
        (["data.kind=kmnist"], False),
    ],
)
def test_figures_of_other_images_are_not_set_beside_ours(overrides: list[str], kept: bool) -> None:
    text = configure.compose("diffdefense-table1", overrides)
    made = YAML(typ="safe", pure=True).load(text)
    assert bool(made["published"]) == kept


def test_configure_writes_nothing_when_it_refuses(tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "project")
    before = (folder / "params.yaml").read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "configure", "digits", "threat.eps_25=8"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert (folder / "params.yaml").read_bytes() == before


def test_a_network_and_its_use_are_checked_before_it_is_trained(tmp_path: Path) -> None:
    value = project.tiny()
    for change, said in (
        ({"inference": {"t_star": 20}}, "t_star: 20, but the ddpm knows indices 0 to 19"),
        ({"ladder": {"direct": ["pgd"]}}, "names direct; diffpure offers short"),
        ({"model": "denoiser"}, "diffpure needs a model of kind ddpm, not denoiser"),
    ):
        section = value["defenses"]["diffpure"]
        inference = {**section["inference"], **change.get("inference", {})}
        changed = {**section, **change, "inference": inference}
        path = tmp_path / "params.yaml"
        with path.open("w") as file:
            YAML(typ="safe").dump(
                {**value, "defenses": {**value["defenses"], "diffpure": changed}}, file
            )
        with pytest.raises(ConfigError, match=said):
            schema.load(path)
    path = tmp_path / "params.yaml"
    with path.open("w") as file:
        bare = {**value["defenses"]["diffpure"], "inference": None}
        YAML(typ="safe").dump({**value, "defenses": {"bare": bare}}, file)
    with pytest.raises(ConfigError, match="a ddpm is no purifier by itself: say its inference"):
        schema.load(path)
