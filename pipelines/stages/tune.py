"""Search for better settings of a defense: one study of params.yaml.

Reads data/{train,val}, all models and the pool, writes reports/tuning/<study>. Ray Tune runs the
trials that Optuna proposes, and ASHA stops weak ones early where trials train; a killed search
continues when the same command runs again. It changes no parameters:
`limpid configure --from reports/tuning/NAME/best.yaml` adopts what it found. It never sees the test
split: `dvc repro` measures what was adopted.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from components.attacks import AttackConfig, Threat
from components.data.shards import write_bytes, write_json
from pipelines.cluster import session
from pipelines.config.resources import Resources
from pipelines.config.search_space import Choice, Domain, Integer, LogUniform, Value, get, nest
from pipelines.config.sections import Defended, Finetuned, Name, Purifier, Scoring, Student, Study
from pipelines.config.views import TrainingView
from pipelines.config.yaml_files import write_yaml
from pipelines.reporting import leaderboard
from pipelines.reporting.leaderboard import Report, SearchMonitor, Trial
from pipelines.runner.console import show
from pipelines.runner.context import Context
from pipelines.storage import job_files, jobs
from pipelines.tasks.trial import ROBUST, StudySetup, run_trial

# The sections that a trial may change.
SECTIONS = ("purifiers", "students", "atop", "defenses")
GOALS = {ROBUST: "max", "clean": "max", "seconds_per_image": "min"}
# The CPUs of a trial that only waits for its training workers.
WAITING_CPUS = 0.01
STUDY = "study"
SYNC_S = 15


class TuneParams(TrainingView):
    """One study, and the sections its trials may change."""

    study: Study
    purifiers: dict[str, Purifier]
    students: dict[str, Student]
    atop: dict[str, Finetuned]
    defenses: dict[str, Defended]
    threat: Threat
    attacks: dict[Name, AttackConfig]
    scoring: Scoring
    tracks = {
        **TrainingView.tracks,
        "study": "tuning.studies.{name}",
        **{name: name for name in (*SECTIONS, "threat", "attacks", "scoring")},
    }


def run(
    params: TuneParams,
    context: Context,
    *,
    name: str,
    train: Path,
    val: Path,
    models: Path,
    pool: Path,
    out: Path,
) -> dict[str, float]:
    """Run the trials of a study, rank them, and write what `configure --from` adopts."""
    document = params.model_dump(mode="json", by_alias=True, include=set(SECTIONS))
    setup = StudySetup(
        params.study, document, params, params.threat, params.attacks, params.scoring,
        _resources(context), *(folder.absolute() for folder in (train, val, models, pool)),
    )  # fmt: skip
    for key, domain in params.study.space.items():
        for bound in domain.bounds():
            setup.sections({key: bound})
    ranked = leaderboard.rank(_search(setup, context), params.study)
    show(leaderboard.table(ranked, params.study))
    out.mkdir(parents=True)
    write_json(out / "trials.json", [vars(trial) for trial in ranked])
    best = ranked[0]
    write_bytes(out / "best.yaml", write_yaml(nest(best.values)).encode())
    if params.study.goal == "pareto":
        for trial in ranked:
            if trial.front:
                path = out / "front" / f"{trial.name}.yaml"
                write_bytes(path, write_yaml(nest(trial.values)).encode())
    return {"trials": len(ranked), **best.figures}


def _search(setup: StudySetup, context: Context) -> list[Trial]:
    """Run all trials, or those that an interrupted search has left."""
    # Otherwise Tune prints a page of its own about every search.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune

    folder = _folder(context)
    path = f"{folder}/{STUDY}"
    own, train = setup.resources.trials, setup.resources.train
    # The training workers of all trials that run at once.
    training = train.model_copy(update={"workers": own.workers * train.most})
    trainable = tune.with_parameters(_trial, setup=setup, work=str(context.work.absolute()))
    needed = {"CPU": WAITING_CPUS if train.most else own.cpus}
    if own.gpus_each:
        needed["GPU"] = own.gpus_each
    trainable = tune.with_resources(trainable, needed)
    monitor = SearchMonitor(setup.study, context, lambda: _read_trials(path))
    with session.hold(own, training), monitor:
        with session.quiet():
            if tune.Tuner.can_restore(path):
                tuner = tune.Tuner.restore(
                    path, trainable=trainable, resume_unfinished=True, restart_errored=True
                )
            else:
                tuner = _tuner(setup, trainable, folder)
            results = session.run_in_thread(tuner.fit, monitor.update)
        reasons = [str(r.error).strip().splitlines()[-1] for r in results if r.error]
    trials = monitor.trials()
    if not any(trial.right for trial in trials):
        raise ValueError(f"no trial ran to its end: {(reasons or ['none was run'])[0]}")
    if reasons:
        failed = f"{len(reasons)} of {len(results)} trials failed"
        context.progress.say(f"{failed}, the first with: {reasons[0]}")
    return trials


def _resources(context: Context) -> Resources:
    """Return the resources of trials; one that trains in its own process trains with its own."""
    resources = context.resources
    if resources.train.most:
        return resources
    own = {"cpus": resources.trials.cpus, "gpus": resources.trials.gpus}
    return resources.model_copy(update={"train": resources.train.model_copy(update=own)})


def _folder(context: Context) -> str:
    """Return where a search keeps what it needs to continue: this disk, or the store of a job."""
    if jobs.job():
        return f"{os.environ[jobs.STORAGE]}/ray/{context.work.name}"
    return str(context.work.absolute() / "ray")


def _tuner(setup: StudySetup, trainable: Any, folder: str) -> Any:
    """Return a new search, whose first trial has the present values of params.yaml."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    study = setup.study
    alone = study.goal == "robust"
    metric: Any = ROBUST if alone else list(GOALS)
    mode: Any = "max" if alone else list(GOALS.values())
    present = {key: get(setup.document, key) for key in study.space}
    inside = all(domain.contains(present[key]) for key, domain in study.space.items())
    search = OptunaSearch(
        {key: _distribution(domain) for key, domain in study.space.items()},
        metric=metric, mode=mode, seed=setup.shared.seed,
        points_to_evaluate=[present] if inside else None,
    )  # fmt: skip
    epochs = setup.epochs(setup.sections({}))
    scheduler = ASHAScheduler(
        time_attr="epoch", metric=ROBUST, mode="max", max_t=max(epochs, study.grace + 1),
        grace_period=study.grace, reduction_factor=study.reduction,
    )  # fmt: skip
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler if alone else None,
            num_samples=study.trials,
            max_concurrent_trials=setup.resources.trials.workers,
        ),
        run_config=tune.RunConfig(
            name=STUDY,
            storage_path=folder,
            verbose=0,
            sync_config=tune.SyncConfig(sync_period=SYNC_S),
        ),
    )


def _distribution(domain: Domain) -> Any:
    import optuna.distributions as known

    if isinstance(domain, Choice):
        return known.CategoricalDistribution(domain.values)
    if isinstance(domain, Integer):
        return known.IntDistribution(domain.low, domain.high)
    return known.FloatDistribution(domain.low, domain.high, log=isinstance(domain, LogUniform))


def _trial(config: dict[str, Value], setup: StudySetup, work: str) -> None:
    """Run one trial in a process of Ray Tune."""
    from ray import tune

    job_files.download_inputs()
    name = tune.get_context().get_trial_id()
    run_trial(setup, config, Path(work) / "trials" / name, tune.report)


def _read_trials(folder: str) -> Iterator[tuple[Trial, Sequence[Report]]]:
    """Yield every trial that has reported, with its reports, from the files of Ray Tune."""
    for text in _result_files(folder):
        lines = text.splitlines(keepends=True)
        # The last line may be half written.
        written = [json.loads(line) for line in lines if line.endswith("\n")]
        # Tune repeats the last report when a trial ends, and a resumed trial its earlier ones.
        reports = list({report["epoch"]: report for report in written}.values())
        if reports:
            last = reports[-1]
            yield Trial.of(last["trial_id"], last["config"], last), reports


def _result_files(folder: str) -> list[str]:
    """Return the result files of all trials, from this disk or from the store of a job."""
    if jobs.job() is None:
        return [path.read_text() for path in sorted(Path(folder).glob("*/result.json"))]
    there, root = jobs.store(), os.environ[jobs.STORAGE]
    names = there.names(folder.removeprefix(f"{root}/"))
    found = [there.read(name) for name in names if name.endswith("/result.json")]
    return [content.decode() for content in found if content is not None]
