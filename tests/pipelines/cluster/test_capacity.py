"""Room on a cluster: what nodes lack is waited for, but not for ever."""

import pytest

from pipelines.cluster import capacity
from pipelines.config.resources import TrainingWorkers
from pipelines.errors import ConfigError


def test_a_lost_node_is_waited_for_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[dict[str, float]] = [{"CPU": 1.0}]
    monkeypatch.setattr(capacity, "nodes", lambda: nodes)
    said: list[str] = []
    watch = capacity.CapacityWatch(TrainingWorkers(workers=[2, 4], cpus=1, gpus=0), 2, said.append)
    watch.check()
    assert "waiting for a node: 2 x 1 CPU needed, and there are 1 nodes" in said[0]
    nodes.append({"CPU": 1.0})
    watch.check()
    assert len(said) == 1 and watch.lacking_since is None
    del nodes[-1]
    watch.check()
    watch.raise_if_given_up()
    watch.seconds = -1
    # A cluster that adds nodes on demand may still get it.
    monkeypatch.setenv(capacity.AUTOSCALES, "1")
    watch.check()
    watch.raise_if_given_up()
    monkeypatch.delenv(capacity.AUTOSCALES)
    watch.check()
    with pytest.raises(ConnectionError, match="gave up after 0 s: 2 x 1 CPU needed"):
        watch.raise_if_given_up()
    assert len(said) == 3


def test_a_time_to_wait_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(capacity.WAIT, "5m")
    with pytest.raises(ConfigError, match="LIMPID_WAIT_S is '5m', and should be a number"):
        capacity.CapacityWatch(TrainingWorkers(workers=1, cpus=1, gpus=0), 1, print)
