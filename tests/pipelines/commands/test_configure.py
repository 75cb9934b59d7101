"""configure composes profiles and overrides, and adopts what a search found."""

import subprocess
import sys
from pathlib import Path

import project
import pytest
from ruamel.yaml import YAML

from pipelines.commands import configure
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
