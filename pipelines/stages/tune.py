"""Reads data/{train,val}, all models and the pool, writes reports/tuning/<study>.

`limpid tune NAME` searches what `tuning.studies.NAME` of params.yaml says, by Ray Tune
with Optuna, and ASHA where trials train; killed, the same command goes on where it was. It changes
no parameters: `limpid configure --from reports/tuning/NAME/best.yaml` adopts what it
found. The test split is out of its reach: what is found here is measured by `dvc repro`.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.live import Live

from components.attacks import AttackConfig
from components.data.shards import write_bytes, write_json
from pipelines.cluster import session
from pipelines.config.resources import Resources
from pipelines.config.search_space import Choice, Domain, Integer, LogUniform, Value, get, nest
from pipelines.config.sections import Defended, Finetuned, Name, Purifier, Scoring, Student, Study
from pipelines.config.views import ThreatView
from pipelines.config.yaml_files import write_yaml
from pipelines.reporting import leaderboard
from pipelines.reporting.leaderboard import Trial
from pipelines.runner.console import show
from pipelines.runner.context import Context
from pipelines.storage import job_files, jobs
from pipelines.tasks.trial import Task, attempt

TURNED = ("purifiers", "students", "atop", "defenses")
GOALS = {"robust": "max", "clean": "max", "seconds_per_image": "min"}
# A trial that trains in workers of its own only waits for them.
WAITING = 0.01
STUDY = "study"
SYNC_S = 15


class TuneParams(ThreatView):
    """One study, and the sections its trials may turn."""

    study: Study
    purifiers: dict[str, Purifier]
    students: dict[str, Student]
    atop: dict[str, Finetuned]
    defenses: dict[str, Defended]
    attacks: dict[Name, AttackConfig]
    scoring: Scoring
    tracks = {
        **ThreatView.tracks,
        "study": "tuning.studies.{name}",
        **{name: name for name in (*TURNED, "attacks", "scoring")},
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
    """Search, rank the trials, and write what `configure --from` adopts."""
    document = params.model_dump(mode="json", by_alias=True, include=set(TURNED))
    task = Task(
        params.study, document, params, params.attacks, params.scoring, _resources(context),
        *(folder.absolute() for folder in (train, val, models, pool)),
    )  # fmt: skip
    for turned, domain in params.study.space.items():
        for end in domain.bounds():
            task.sections({turned: end})
    trials = _search(task, context)
    ranked = leaderboard.rank(trials, params.study)
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
    leaderboard.draw(out, ranked, params.study)
    return {"trials": len(ranked), **best.figures}


def _search(task: Task, context: Context) -> list[Trial]:
    """Run all trials, or those that are left of an interrupted search."""
    # Else Tune prints a page of its own about every search.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune

    folder = _folder(context)
    own, train = task.resources.trials, task.resources.train
    # Those of all trials at once, which train side by side.
    theirs = train.model_copy(update={"workers": own.workers * train.most})
    trainable = tune.with_parameters(_trial, task=task, work=str(context.work.absolute()))
    share = {"CPU": WAITING if train.most else own.cpus}
    if own.gpus:
        share["GPU"] = own.gpus
    trainable = tune.with_resources(trainable, share)
    with session.hold(own, theirs), _Board(folder, task.study, context) as board:
        path = f"{folder}/{STUDY}"
        with session.quiet():
            if tune.Tuner.can_restore(path):
                tuner = tune.Tuner.restore(
                    path, trainable=trainable, resume_unfinished=True, restart_errored=True
                )
            else:
                tuner = _tuner(task, trainable, folder)
            results = session.run_in_thread(tuner.fit, board.look)
        reasons = [str(r.error).strip().splitlines()[-1] for r in results if r.error]
    trials = board.trials()
    if not any(trial.right for trial in trials):
        raise ValueError(f"no trial came to an end: {(reasons or ['none was run'])[0]}")
    if reasons:
        failed = f"{len(reasons)} of {len(results)} trials failed"
        context.progress.say(f"{failed}, the first by {reasons[0]}")
    return trials


def _resources(context: Context) -> Resources:
    """Return what trials may use: one that trains in its own process trains with its own share."""
    resources = context.resources
    if resources.train.most:
        return resources
    own = {"cpus": resources.trials.cpus, "gpus": resources.trials.gpus}
    return resources.model_copy(update={"train": resources.train.model_copy(update=own)})


def _folder(context: Context) -> str:
    """Return where a search keeps what it needs to go on."""
    if jobs.job():
        return f"{os.environ[jobs.STORAGE]}/ray/{context.work.name}"
    return str(context.work.absolute() / "ray")


def _tuner(task: Task, trainable: Any, folder: str) -> Any:
    """Set a search up whose first trial is what params.yaml says now."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    study = task.study
    alone = study.goal == "robust"
    metric: Any = "robust" if alone else list(GOALS)
    mode: Any = "max" if alone else list(GOALS.values())
    now = {place: get(task.document, place) for place in study.space}
    standing = all(domain.contains(now[place]) for place, domain in study.space.items())
    search = OptunaSearch(
        {place: _distribution(domain) for place, domain in study.space.items()},
        metric=metric, mode=mode, seed=task.shared.seed,
        points_to_evaluate=[now] if standing else None,
    )  # fmt: skip
    epochs = task.epochs(task.sections({}))
    scheduler = ASHAScheduler(
        time_attr="epoch", metric="robust", mode="max", max_t=max(epochs, study.grace + 1),
        grace_period=study.grace, reduction_factor=study.reduction,
    )  # fmt: skip
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler if alone else None,
            num_samples=study.trials,
            max_concurrent_trials=task.resources.trials.workers,
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


def _trial(config: dict[str, Value], task: Task, work: str) -> None:
    """Run one trial in a process of Ray Tune."""
    from ray import tune

    job_files.localise()
    name = tune.get_context().get_trial_id()
    attempt(task, config, Path(work) / "trials" / name, tune.report)


class _Board:
    """Follows a search by the files its trials write: on the screen, and in MLflow.

    Not by callbacks, which would be stored with the search and come back without their threads.
    """

    def __init__(self, folder: str, study: Study, context: Context) -> None:
        self.folder, self.study, self.context = folder, study, context
        self.seen: dict[str, int] = {}
        self.live: Live | None = None

    def __enter__(self) -> "_Board":
        if sys.stdout.isatty():
            self.live = Live(refresh_per_second=2)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def trials(self) -> list[Trial]:
        """Return every trial that has reported, as it stands."""
        return [trial for trial, _ in self._read()]

    def look(self) -> None:
        """Show and log what is new."""
        news = False
        for trial, reports in self._read():
            for report in reports[self.seen.get(trial.name, 0) :]:
                news = True
                figures, epoch = _numbers(report)
                self.context.metrics.nested(trial.name, trial.values, figures, epoch)
                if self.live is None:
                    self.context.progress.say(leaderboard.line(trial, self.study))
            self.seen[trial.name] = len(reports)
        if self.live and news:
            ranked = leaderboard.rank(self.trials(), self.study)
            self.live.update(leaderboard.table(ranked, self.study))

    def _read(self) -> Iterator[tuple[Trial, Sequence[Mapping[str, Any]]]]:
        for text in _results(f"{self.folder}/{STUDY}"):
            lines = text.splitlines(keepends=True)
            said = [json.loads(line) for line in lines if line.endswith("\n")]
            # Tune repeats the last report when a trial ends, a resumed trial those of before.
            reports = list({report["epoch"]: report for report in said}.values())
            if reports:
                last = reports[-1]
                yield Trial.of(last["trial_id"], last["config"], last), reports


def _results(folder: str) -> list[str]:
    """Return what the trials of a search have written, from this disk or from the store."""
    if jobs.job() is None:
        return [path.read_text() for path in sorted(Path(folder).glob("*/result.json"))]
    there, root = jobs.store(), os.environ[jobs.STORAGE]
    names = there.names(folder.removeprefix(f"{root}/"))
    found = [there.read(name) for name in names if name.endswith("/result.json")]
    return [content.decode() for content in found if content is not None]


def _numbers(report: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    figures = {name: float(report[name]) for name in leaderboard.FIGURES if name in report}
    return figures, int(report["epoch"])


def _command(argv: Sequence[str]) -> list[str]:
    """Let a person say the name alone: the folders are then those of dvc.yaml."""
    if len(argv) == 1 and not argv[0].startswith("-"):
        folders = {"train": "data/train", "val": "data/val", "models": "models", "pool": "pool"}
        folders["out"] = f"reports/tuning/{argv[0]}"
        return ["--name", argv[0], *(w for k, v in folders.items() for w in (f"--{k}", v))]
    return list(argv)
