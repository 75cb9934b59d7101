"""Parameters are read strictly, and a mistake is refused in one sentence."""

import time
from pathlib import Path

import project
import pytest
from ruamel.yaml import YAML

from pipelines.config import schema
from pipelines.config.resources import Resources
from pipelines.config.schema import Params
from pipelines.config.search_space import put
from pipelines.config.views import View
from pipelines.errors import ConfigError

ROOT = project.ROOT
TEXT = (ROOT / "profiles/digits.yaml").read_text()
STUDENT = "students.student_adaptive"


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


@pytest.mark.parametrize("name", ["state_unchanged", "quantisation", "radius_pays"])
def test_no_check_of_a_plugin_has_the_name_of_one_of_ours(name: str, tmp_path: Path) -> None:
    text = TEXT.replace("thorough: false}", f"thorough: false, plugins: {{{name}: first 1.0}}}}")
    assert f"{name} is the name of one of Limpid's own checks" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
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
        ("optimiser: adamw", "optimiser: adamm", "did you mean adam"),
        ("optimiser: adamw", "optimiser: {kind: sgd, momentum: 0.9}", "nesterov is missing"),
        ("score_draws: 32", "score_draws: 48", "multiple of select_draws"),
        ("images: 128", "images: 8", "greater than or equal to 32"),
        ("full: [fgsm, pgd, apgd_ce, apgd_dlr]", "transfer: [pgd]", "surrogate"),
        ("strided: [2]", "strided: [7]", "1..4"),
        (
            "augmentation: none\n      precision: float32\n  normal_teacher",
            "augmentation: flip\n      precision: float32\n  normal_teacher",
            "purifiers: augmentation flip moves images, and the examples",
        ),
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
            "{classifier: standard, model: student_adaptive, ladder: *whole}",
            "{classifier: standard, model: student_adaptive, ladder: *whole, inference: "
            "{kind: defense_gan, iterations: 5, restarts: 2, rate: 10}}",
            "defense_gan needs a model of kind gan, not conv_autoencoder",
        ),
        (
            "model: *autoencoder\n    objective: {kind: normal_teacher}",
            "model: {kind: gan, latent: 8, width: 4}\n"
            "    objective: {kind: wgan_gp, critic_steps: 5}",
            "names normal_teacher, a gan, which maps no image to an image",
        ),
        ("trials: {workers: 2", "trials: {workers: 0", "resources.trials.workers"),
        (
            "none:\n    classifier: standard",
            "none:\n    classifier: robust",
            "baselines.none.classifier is robust, but purifiers are trained in front of standard",
        ),
        (
            "  bim: {kind: bim, steps: 20, step: 0.1, early_stop: true, eot: 4}",
            "  bim: {kind: bim, steps: 20, step: 0.1, early_stop: true, eot: 4}\n"
            "  autoattack: {kind: noise, tries: 1}",
            "attacks.autoattack is of kind noise: name it otherwise",
        ),
        ("base: masked", "base: maskd", "did you mean masked?"),
        ("[defense_teacher, normal_teacher]", "[defence_teacher]", "did you mean defense_teacher?"),
        ("[defense_teacher, normal_teacher]", "[]", "teachers"),
        (
            "teachers: [defense_teacher, normal_teacher]",
            "adversarial_teacher: defense_teacher\n    normal_teacher: normal_teacher",
            "unknown key students.student_adaptive.adversarial_teacher",
        ),
        (
            "[defense_teacher, normal_teacher]",
            "[normal_teacher, normal_teacher]",
            "teachers names normal_teacher twice: name it once",
        ),
        ("model: student_grey", "model: student_gray", "did you mean student_grey?"),
        ("full: [fgsm, pgd, apgd_ce, apgd_dlr]", "full: [fgms]", "did you mean fgsm?"),
        ("bpda: [pgd]\n      full: [fgsm, pgd, apgd_ce, apgd_dlr]", "bdpa: [pgd]", "bpda"),
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
def test_wrong_parameters_are_refused_in_one_sentence(
    tmp_path: Path, old: str, new: str, reason: str
) -> None:
    assert old in TEXT
    assert reason in refusal(tmp_path, TEXT.replace(old, new, 1))


def test_resources_of_an_instance_override_those_of_its_stage() -> None:
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


def test_wrong_parameters_are_refused_before_a_stage_starts(tmp_path: Path) -> None:
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


def test_inference_that_does_not_fit_its_network_is_refused(tmp_path: Path) -> None:
    value = project.tiny()
    for change, reason in (
        ({"inference": {"t_star": 20}}, "t_star: 20, but the ddpm was trained on indices 0 to 19"),
        ({"ladder": {"direct": ["pgd"]}}, "names direct; diffpure offers short"),
        ({"ladder": {"network": ["pgd"]}}, "names network, which needs direct; diffpure offers"),
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
        with pytest.raises(ConfigError, match=reason):
            schema.load(path)
    path = tmp_path / "params.yaml"
    with path.open("w") as file:
        bare = {**value["defenses"]["diffpure"], "inference": None}
        YAML(typ="safe").dump({**value, "defenses": {"bare": bare}}, file)
    with pytest.raises(ConfigError, match="a ddpm is no purifier by itself: give its inference"):
        schema.load(path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (None, "name one of tuning.studies in params.yaml: there are student, atop"),
        (
            "studnt",
            "params.yaml has no studnt in tuning.studies, did you mean student?; there are "
            "student, atop",
        ),
        ("nobody", "params.yaml has no nobody in tuning.studies; there are student, atop"),
    ],
)
def test_a_view_without_or_of_an_unknown_instance_lists_the_instances(
    name: str | None, sentence: str
) -> None:
    class StudyGoal(View):
        goal: str
        tracks = {"goal": "tuning.studies.{name}.goal"}

    params = schema.load(ROOT / "params.yaml")
    assert StudyGoal.of(params, "student").goal == "robust"
    with pytest.raises(ConfigError) as caught:
        StudyGoal.of(params, name)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tuning.run": ["nobody"]}, "tuning.run names nobody"),
        ({"tuning.studies.student.defense": "studnt_adaptive"}, "did you mean student_adaptive"),
        ({"tuning.studies.student.ladder": {"bpda": ["pgd"]}}, "sees through the purifier"),
        ({"tuning.studies.student.ladder": {"full": ["cw"]}}, "stay inside the threat"),
        (
            {"attacks.a3": {"kind": "a3", "threat": {"norm": "linf", "eps_255": 102}}},
            "a3 does not stay inside the threat",
        ),
        ({"tuning.studies.student.ladder": {"classifier": ["pgd"]}}, "sees through the purifier"),
        ({"tuning.studies.student.ladder": {"full": ["pgd"], "transfer": ["pgd"]}}, "transfer"),
        (
            {"tuning.studies.atop.ladder": {"full": ["a3"]}},
            r"studies\.atop\.ladder names a3 on the rung full: a3 is not for stochastic defenses",
        ),
        (
            {"tuning.studies.student.space": {"classifiers.standard.model.width": "DOMAIN"}},
            "plays no part in student_adaptive",
        ),
        ({"tuning.studies.student.space": {f"{STUDENT}.objective": "DOMAIN"}}, "no single value"),
        ({"tuning.studies.student.space": {f"{STUDENT}.objective.bta": "DOMAIN"}}, "there is no"),
    ],
)
def test_a_study_that_cannot_run_is_refused(change: dict, reason: str) -> None:
    domain = {"kind": "uniform", "low": 0, "high": 1}
    value = {
        key: {k: domain if v == "DOMAIN" else v for k, v in given.items()}
        if isinstance(given, dict)
        else given
        for key, given in change.items()
    }
    with pytest.raises(ValueError, match=reason):
        Params.model_validate(put(project.tiny(), value))
