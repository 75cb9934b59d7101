"""Nothing is scored where the selftest does not show that the checks of this version work."""

import json
from pathlib import Path
from typing import Any

import project
import pytest

from components.data.shards import DataError
from components.selftest import HONEST, LIES
from pipelines.config import schema
from pipelines.stages import evaluate


def results() -> list[dict[str, Any]]:
    """Return the results of a selftest in which all came out right."""
    lies = [
        {"case": lie, "expected": check, "raised": [check], "caught": True}
        for lie, (check, _) in LIES.items()
    ]
    honest = [{"case": n, "expected": None, "raised": [], "caught": True} for n in HONEST]
    return [*lies, *honest]


def refusal(path: Path) -> str:
    """Evaluate with this selftest and no other input, and return the error."""
    paths = ("train", "val", "test", "models", "adversarial")
    outs = [f"out_{name}" for name in ("metrics", "headlines", "scores", "plots", "report")]
    missing = {name: path.parent / "missing" / name for name in (*paths, *outs)}
    nothing: Any = None
    with pytest.raises(DataError) as caught:
        evaluate.run(nothing, nothing, selftest=path, **missing)
    return str(caught.value)


def test_the_cases_of_this_version_are_asked_for_by_name(tmp_path: Path) -> None:
    path = tmp_path / "selftest.json"

    def refused(cases: list[dict[str, Any]]) -> str:
        path.write_text(json.dumps(cases))
        message = refusal(path)
        assert "\n" not in message
        return message.partition(" does not show ")[2]

    whole, lie, honest = results(), next(iter(LIES)), next(iter(HONEST))
    assert f"and {len(whole) - 3} more;" in refused([]) and f"right: {lie}, " in refused([])
    assert f"right: {lie};" in refused(whole[1:])
    assert f"right: {honest};" in refused([one for one in whole if one["case"] != honest])
    assert f"right: {lie};" in refused([{**whole[0], "caught": False}, *whole[1:]])
    assert f"right: {lie};" in refused([{**whole[0], "expected": "older"}, *whole[1:]])
    assert "right: more;" in refused([{**whole[0], "case": "more", "caught": False}, *whole])
    # Whole, it is believed: then the images are missing.
    assert refused([*whole, {**whole[0], "case": "more"}]) == ""


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b'[{"case": "x"}]'])
def test_a_selftest_that_cannot_be_read_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "selftest.json"
    if content is not None:
        path.write_bytes(content)
    assert refusal(path) == f"{path} cannot be read; `limpid selftest` renews it"


def test_examples_of_all_baselines_are_tried_on_the_others() -> None:
    params = evaluate.EvaluateParams.of(schema.load(project.ROOT / "profiles/digits.yaml"), None)
    folder = Path("/nowhere")
    entries = evaluate._entries(params, folder / "models", folder / "adversarial")
    plan = evaluate._plan(params, entries, folder / "val", folder / "test", folder / "models")
    assert [one.name for one in plan.baselines] == ["none", "adversarial_training"]
    assert plan.baselines[1].subject.classifier == folder / "models/robust"
