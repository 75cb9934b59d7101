"""The dvc.yaml of a project without the sources of Limpid."""

from pathlib import Path

import pytest

from pipelines.layout import DVC_YAML
from pipelines.runner import installed


def test_dvc_yaml_says_that_it_is_written_anew_and_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of an older version, too, which says less."""
    monkeypatch.chdir(tmp_path)
    older = "# Written by `limpid configure`, for the Limpid that is installed.\nstages: {}\n"
    DVC_YAML.write_text(older)
    installed.write()
    text = DVC_YAML.read_text()
    assert "changes of yours, such as stages, are lost then" in text.splitlines()[1]
    assert "stages: {}" not in text
