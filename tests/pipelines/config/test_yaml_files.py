"""Editing YAML changes the given keys, and nothing else of the text."""

from ruamel.yaml import YAML

from pipelines.config.yaml_files import edit_yaml

TEXT = """\
# Kept.
one: &shared {rate: 0.1, steps: 3}  # this, too
two:
  training: *shared
  none: null
three: *shared
"""


def test_editing_an_alias_keeps_the_rest_of_the_text() -> None:
    edited = edit_yaml(TEXT, {"two.training.rate": 0.5})
    read = YAML(typ="safe", pure=True).load(edited)
    assert read["two"]["training"] == {"rate": 0.5, "steps": 3}
    assert read["one"] == read["three"] == {"rate": 0.1, "steps": 3}
    assert read["two"]["none"] is None
    kept = set(TEXT.splitlines()) - {"  training: *shared"}
    assert kept <= set(edited.splitlines())


def test_editing_an_anchor_changes_no_alias() -> None:
    read = YAML(typ="safe", pure=True).load(edit_yaml(TEXT, {"one.rate": 0.5}))
    assert (
        read["one"]["rate"] == 0.5
        and read["three"]["rate"] == read["two"]["training"]["rate"] == 0.1
    )
