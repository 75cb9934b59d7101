"""configure composes profiles and overrides, and adopts what a search found."""

import subprocess
import sys
from pathlib import Path

import project
import pytest
from ruamel.yaml import YAML

from pipelines.commands import configure
from pipelines.config import schema
from pipelines.config.schema import Params
from pipelines.errors import ConfigError

ROOT = project.ROOT


@pytest.mark.parametrize("profile", sorted(p.stem for p in (ROOT / "profiles").glob("*.yaml")))
def test_every_profile_is_valid(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    value = YAML(typ="safe", pure=True).load(configure.compose(profile, []))
    assert Params.model_validate(value).classifiers


def test_overrides_change_their_keys_and_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = configure.compose(
        "mnist", ["data.kind=parquet", "data.path=some where", "attacks.pgd.steps=7"]
    )
    made = Params.model_validate(YAML(typ="safe", pure=True).load(text))
    assert made.data.kind == "parquet"
    assert made.data.path == "some where"
    # Both kinds of source have this key, and the profile keeps it.
    assert made.data.val == 1000
    assert made.attacks["pgd"].steps == 7


@pytest.mark.parametrize(
    ("profile", "overrides", "reason"),
    [
        ("mnis", [], "there are apudae-table2,"),
        ("digits", ["threat.eps_255"], "section.key=value"),
        ("digits", ["threat.eps_25=8"], "did you mean eps_255?"),
        ("digits", ["threat.eps_255=["], "not readable"),
    ],
)
def test_a_wrong_profile_or_override_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, profile: str, overrides: list[str], reason: str
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=reason.replace("[", r"\[")):
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
def test_published_accuracies_are_dropped_for_another_data_set(
    overrides: list[str], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = configure.compose("diffdefense-table1", overrides)
    made = YAML(typ="safe", pure=True).load(text)
    assert bool(made["published"]) == kept


def test_a_check_of_a_plugin_is_named_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "darkness.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: darkness\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[limpid.checks]\ntoo_dark = darkness_check:check\n")
    (tmp_path / "darkness_check.py").write_text("def check(bench): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "profiles/digits.yaml").read_text()
    kept, asked = "thorough: false}", "thorough: false, plugins: {too_dark: ''}}"
    Path("params.yaml").write_text(text.replace(kept, asked))
    with pytest.raises(ConfigError, match=r"checks\.plugins is missing for too_dark, and darkness"):
        schema.load()
    renewed = configure.renewed(Path("params.yaml").read_text())
    Path("params.yaml").write_text(renewed)
    pin = schema.load().checks.plugins["too_dark"]
    assert pin.startswith("darkness 1.0 sha256-")
    assert renewed == text.replace(kept, f"thorough: false, plugins: {{too_dark: {pin}}}}}")
    Path("params.yaml").write_text(renewed.replace("too_dark", "too_light"))
    with pytest.raises(ConfigError, match="no plugin here has the check too_light; there are too"):
        schema.load()


def test_a_refused_command_writes_nothing(tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "project")
    before = (folder / "params.yaml").read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "configure", "digits", "threat.eps_25=8"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert (folder / "params.yaml").read_bytes() == before


def test_a_profile_or_a_file_is_needed_and_not_both(tmp_path: Path) -> None:
    for argv in ([], ["digits", "--from", str(tmp_path / "best.yaml")]):
        with pytest.raises(ConfigError, match="give a profile, or --from a file of values"):
            configure.main(argv)


def test_the_norm_of_a_threat_is_switched_whole_or_key_by_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    for overrides in (
        ["threat={norm: l2, eps_l2: 1.5}"],
        ["threat.norm=l2", "threat.eps_l2=1.5"],
    ):
        made = Params.model_validate(
            YAML(typ="safe", pure=True).load(configure.compose("digits", overrides))
        )
        assert made.threat.model_dump() == {"norm": "l2", "eps_l2": 1.5}
        assert made.training_threat.norm == "linf", "a test changes no training"


OLD = """\
seed: 0
# The field's radius.
threat: {norm: linf, eps_255: 51}
classifiers: {}
purifiers:
  masked:
    objective: {kind: reconstruction}
    training: {optimiser: adam_gan}
students:
  student:
    # Two teachers.
    adversarial_teacher: first
    normal_teacher: second
atop: {}
attacks:
  bim: {kind: bim, steps: 20, step: 0.1, eot: 4}
defenses:
  one: {model: student, inference: {kind: diffdefense, mode: faithful}}
controls: {}
"""
NEW = """\
seed: 0
# The field's radius.
threat: {norm: linf, eps_255: 51}
training_threat: {norm: linf, eps_255: 51}
external: {}
classifiers: {}
purifiers:
  masked:
    objective: {kind: reconstruction, loss: mse}
    training: {optimiser: {kind: adam, betas: [0.5, 0.9]}}
students:
  student:
    # Two teachers.
    teachers: [first, second]
atop: {}
attacks:
  bim: {kind: bim, steps: 20, step: 0.1, early_stop: true, eot: 4}
defenses:
  one: {classifier: standard, model: student, inference: {kind: diffdefense, mode: ddim}}
controls: {}
"""


def test_an_older_file_gets_the_keys_it_lacks_and_keeps_the_rest_as_it_is_written() -> None:
    assert configure.migrated(OLD) == NEW
    assert configure.migrated(NEW) == NEW, "nothing is done twice"


def test_files_of_this_version_need_no_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    read = YAML(typ="safe", pure=True).load
    for path in (ROOT / "params.yaml", *(ROOT / "profiles").glob("*.yaml")):
        assert read(configure.migrated(path.read_text())) == read(path.read_text()), path


def test_an_older_file_is_refused_by_a_sentence_that_says_what_to_do(tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "project")
    text = (ROOT / "params.yaml").read_text()
    line = "training_threat: {norm: linf, eps_255: 51}\n"
    (folder / "params.yaml").write_text(text.replace(line, ""))
    code, printed = project.run(folder, sys.executable, "-m", "pipelines", "resolve_ladders")
    assert code == 2 and "Traceback" not in printed
    assert "training_threat is missing; `limpid configure --migrate` brings" in printed
    command = [sys.executable, "-m", "pipelines", "configure", "--migrate"]
    assert project.run(folder, *command)[0] == 0
    assert (folder / "params.yaml").read_text() == text
    assert project.run(folder, sys.executable, "-m", "pipelines", "resolve_ladders")[0] == 0
