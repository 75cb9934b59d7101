"""`gpus: auto` becomes what is there, before anything is started with it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from project import ROOT
from pydantic import TypeAdapter, ValidationError

from pipelines.cluster import capacity, session
from pipelines.cluster.job_events import Emitter
from pipelines.config import schema
from pipelines.config.resources import Resources, TrainingWorkers, TrialWorkers, Workers
from pipelines.config.views import View
from pipelines.errors import ConfigError
from pipelines.runner import job, stage
from pipelines.runner.context import Context
from pipelines.storage import jobs
from pipelines.storage.jobs import Spec


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """Let this machine have so many GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def resources(gpus: Any = "auto", **workers: Any) -> Resources:
    """Return the resources of params.yaml with these GPUs, and some numbers of workers."""
    value = schema.load(ROOT / "params.yaml").resources.model_dump()
    for name in ("train", "shards", "trials"):
        value[name] |= {"gpus": gpus, "workers": workers.get(name, value[name]["workers"])}
    return Resources.model_validate({**value, "stages": {}})


@pytest.mark.parametrize("gpus", [0, 1])
def test_auto_takes_the_gpu_that_torch_sees(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus)
    found = resources(train=0, shards=1, trials=1).on(session.gpus)
    assert [one.gpus for one in (found.train, found.shards, found.trials)] == [gpus] * 3
    assert found.shards.device == ("cuda" if gpus else "cpu")


@pytest.mark.parametrize(
    ("workers", "gpus", "each"),
    [(1, 4, 1.0), (4, 4, 1.0), (2, 1, 0.5), (3, 2, 0.5), (3, 1, 0.3333), (5, 4, 0.5), (0, 1, 1.0)],
)
def test_workers_share_the_gpus_there_are(workers: int, gpus: int, each: float) -> None:
    found = Workers(workers=workers, cpus=1, gpus="auto").on(gpus)
    assert found.gpus == each
    # On every GPU there is room for its part of the workers.
    assert int(1 / each) * gpus >= workers
    assert TrialWorkers(workers=max(workers, 1), cpus=1, gpus="auto").on(gpus).gpus == each


@pytest.mark.parametrize(("gpus", "each"), [(0, 0.0), (1, 1.0), (8, 1.0)])
def test_workers_of_one_training_share_no_gpu(gpus: int, each: float) -> None:
    assert TrainingWorkers(workers=[2, 4], cpus=1, gpus="auto").on(gpus).gpus == each


def test_a_number_of_gpus_stays_and_nothing_is_counted_for_it() -> None:
    def counted() -> int:
        raise AssertionError("GPUs were counted")

    given = resources(gpus=0.25)
    assert given.on(counted) == given


def test_auto_of_a_stage_is_its_own() -> None:
    value = resources(gpus=0).model_dump()
    auto = {"shards": {"workers": 1, "cpus": 1, "gpus": "auto"}}
    given = Resources.model_validate({**value, "stages": {"evaluate": auto}})
    assert given.of("evaluate").on(lambda: 1).shards.device == "cuda"
    assert given.of("generate_baseline").on(lambda: 1).shards.device == "cpu"


def test_auto_in_a_job_is_what_the_cluster_has(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 0)
    monkeypatch.setenv(jobs.JOB, "a-job")
    monkeypatch.setattr(session, "held", lambda: True)
    monkeypatch.setattr(session, "nodes", lambda: [{"CPU": 4}, {"CPU": 4, "GPU": 2}, {"GPU": 1}])
    found = resources(train=1, shards=6, trials=1).on(session.gpus)
    assert (found.train.gpus, found.shards.gpus) == (1.0, 0.5)


class Nothing(View):
    """Parameters of a stage that sees none."""


class Spy:
    """A stage that notes what it may use."""

    def __init__(self) -> None:
        self.seen: list[Resources] = []

        def run(params: Nothing, context: Context) -> dict[str, float]:
            self.seen.append(context.resources)
            return {}

        self.run = run


def test_a_stage_that_runs_here_gets_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 1)
    spy = Spy()
    call: Any = SimpleNamespace(
        resources=resources(shards=4), module=spy, view=Nothing(), options={},
        work=lambda key: tmp_path,
    )  # fmt: skip
    stage._run_here(call, "key", {}, Emitter(), Emitter())
    assert [one.shards.gpus for one in spy.seen] == [0.25]


def test_a_stage_in_a_job_gets_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "require_versions", lambda theirs: None)
    monkeypatch.setattr(job.job_files, "download_inputs", lambda: None)
    monkeypatch.setattr(job.jobs, "home", lambda: tmp_path)
    monkeypatch.setattr(job.importlib, "import_module", lambda name: spy)
    monkeypatch.setattr(job.session, "gpus", lambda: 2)
    spec = Spec(
        stage="spy", options={}, deps={}, view={}, versions={}, work="work",
        resources=resources(shards=4).model_dump(mode="json"),
    )  # fmt: skip
    job._run(spec, Emitter())
    assert [one.shards.gpus for one in spy.seen] == [0.5]


def test_auto_and_numbers_survive_the_way_to_a_job() -> None:
    for gpus in ("auto", 0.25, 1):
        given = resources(gpus=gpus)
        assert Resources.model_validate(given.model_dump(mode="json")) == given


@pytest.mark.parametrize("gpus", ["all", "1", -1, True, float("nan")])
def test_other_gpus_are_refused_in_one_sentence(gpus: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Workers).validate_python({"workers": 1, "cpus": 1, "gpus": gpus})
    said = schema.explain(caught.value)
    assert said.startswith("gpus: should be a number of GPUs that is not negative, or auto")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_gpu_that_is_not_there_is_refused_with_and_without_workers(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 0)
    wanted = Workers(workers=workers, cpus=1, gpus=1)
    refusal = "this machine has 0; gpus: 0 works on the CPU, and auto on either"
    with pytest.raises(ConfigError, match=refusal), session.hold(wanted):
        raise AssertionError("held")
    machine(monkeypatch, 1)
    session.require_gpus(wanted)


def test_gpus_of_nodes_are_added_up() -> None:
    assert capacity.gpus_of([{"CPU": 1.0}, {"GPU": 1.0}, {"GPU": 4.0, "CPU": 2.0}]) == 5
