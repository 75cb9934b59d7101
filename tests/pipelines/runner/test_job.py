"""A node of a cluster refuses parameters that it cannot read, in one sentence."""

import json
from typing import Any

import project
import pytest

from pipelines.config.schema import Params
from pipelines.errors import ConfigError
from pipelines.runner import job
from pipelines.stages import train_purifier
from pipelines.stages.train_purifier import PurifierParams


def test_a_node_without_the_plugin_of_a_stage_says_so() -> None:
    name = "adversarial_teacher"
    view = PurifierParams.of(Params.model_validate(project.base()), name)
    values: dict[str, Any] = json.loads(json.dumps(view.model_dump(mode="json", by_alias=True)))
    assert job.view_of(train_purifier, values) == view
    values["purifier"]["model"] = {"kind": "bilateral", "radius": 1, "plugin": "p 1.0 sha256-0"}
    with pytest.raises(ConfigError) as caught:
        job.view_of(train_purifier, values)
    message = str(caught.value)
    assert message.startswith(
        "this node cannot run what it was sent: purifier.model: Input tag 'bilateral' found"
    )
    assert message.endswith("; if it comes from a plugin, this Python lacks it: install it here")
    assert "\n" not in message
