"""The model registry of MLflow: every scored defense is a version of one registered model.

A version is identified by its networks, its settings, the code of the defense, and its figures:
where one of these changes, another version is made, and no version gets other figures. It carries
its verdict, the checks that failed and a description. Of versions of one defense in one ball, the
one that was evaluated last counts. Registering moves the alias `candidate`; only a person moves
`champion`, and a version is verified byte by byte before.
"""

import contextlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import components
from components.data.shards import DataError, write_bytes
from pipelines.layout import MLFLOW_DB
from pipelines.storage.locks import lock

CHAMPION, CANDIDATE = "champion", "candidate"
# What stands for a stage in a run that only registers what was evaluated before.
SYNC = "sync"
# A defense that stands like this becomes the champion by an explicit wish only.
NO_CHAMPION = ("broken", "no better than a control", "not measured")
# A figure of the machine: it differs from one evaluation to the next.
TIME = "ms_per_image"
# The tags that say what the figures are worth; the served model carries them too.
WORTH = ("standing", "verdict", "measurement valid", "blocking_failed", "threat")
# What a served model needs, in the versions that scored it.
REQUIRED = ("torch", "safetensors", "pydantic", "numpy", "pyarrow")


@dataclass(frozen=True)
class Registration:
    """A defense to register: its folders, figures and description.

    `digest` is the identity of the defense that was scored, its code included; the served model
    carries it, the figures and the tags in WORTH. `inference` says how the network of the purifier
    folder is used. `artifacts` are files on disk, `files` the contents of others by name; both are
    logged in the run of the defense.
    """

    name: str
    version_of: str
    fingerprint: str
    digest: str
    folders: Mapping[str, Path]
    inference: Mapping[str, Any] | None
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    description: str
    params: Mapping[str, Any] = field(default_factory=dict)
    artifacts: Sequence[Path] = ()
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Version:
    """A registered defense, as it is in the store."""

    number: int
    defense: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    source: str
    superseded_by: int | None = None

    def figure(self, name: str) -> float:
        """Return the figure of this name; NaN where there is none."""
        return float(json.loads(self.tags.get("limpid.figures", "{}")).get(name, "nan"))

    @property
    def failed(self) -> list[str]:
        """The names of the blocking checks that failed."""
        return [name for name in self.tags.get("blocking_failed", "").split(", ") if name]

    @property
    def valid(self) -> bool:
        """Whether it says that its measurement is valid, and that no check failed."""
        said = self.tags.get("measurement valid") == "yes" and not self.failed
        return said and self.figure("blocking_failed_count") == 0

    @property
    def standing(self) -> str:
        """How it stands beside no defense, controls and adversarial training.

        Versions that an older Limpid registered say nothing: "".
        """
        return self.tags.get("standing", "")

    @property
    def evaluated(self) -> int:
        """When its last evaluation began, in ms; 0 where nothing says it."""
        return int(self.tags.get("limpid.evaluated", "0"))

    @property
    def threat(self) -> dict[str, Any]:
        """The threat model, with the numbers of images and draws; empty where nothing says it."""
        return dict(json.loads(self.tags.get("threat", "{}")))

    @property
    def ball(self) -> tuple[Any, ...]:
        """The norm and the radius."""
        return tuple(self.threat.get(key) for key in ("norm", "eps_255", "eps_l2"))

    def supersedes(self, other: "Version") -> bool:
        """Whether this is the same defense in the same ball, evaluated after `other`.

        How many images there were makes no difference: the newer figures count.
        """
        same = self.tags.get("limpid.digest") == other.tags.get("limpid.digest")
        return same and self.ball == other.ball and self.evaluated > other.evaluated


def tracking_uri() -> str:
    """Return the URI of the store: MLFLOW_TRACKING_URI, else SQLite beside the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{MLFLOW_DB.absolute()}"


def connect() -> Any:
    """Return a client of the store; create a SQLite store where there is none."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(tracking_uri())
    # Creating a client starts the migrations of a SQLite store; two processes that run them at once
    # break each other's.
    with lock("mlflow"):
        _create_store(tracking_uri())
        client = mlflow.MlflowClient()
        client.search_experiments(max_results=1)
    return client


def _create_store(uri: str) -> None:
    """Create a SQLite store under another name, then rename it: half a migration cannot go on."""
    import mlflow

    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
        return
    part = path.with_name(f"{path.name}.part")
    for old in (part, part.with_name(f"{part.name}-journal")):
        old.unlink(missing_ok=True)
    mlflow.MlflowClient(f"sqlite:///{part}").search_experiments(max_results=1)
    part.replace(path)


def register(
    client: Any, run: str, one: Registration, provenance: Mapping[str, str], started: int
) -> None:
    """Register a defense, once for each of its figures; later calls renew tags and description.

    Figures and files are logged in `run` at every call. `started`, in ms, is when the stage began
    that evaluated the defense. A stage that only registers, SYNC, leaves known versions their time.
    """
    import mlflow

    name, known = one.version_of, None
    with contextlib.suppress(mlflow.exceptions.MlflowException):
        found = client.search_model_versions(f"name = '{name}'")
        known = next((version for version in found if _is(version.tags, one)), None)
    if known is None:
        known = _add_version(client, run, one)
    mlflow.log_metrics(dict(one.metrics), run_id=run, model_id=known.model_id)
    _log_files(client, run, one)
    # The page of a model lists tags in this order: those for people come first.
    tags = {**one.tags, "limpid.figures": json.dumps(dict(one.metrics))}
    tags |= {"limpid.fingerprint": one.fingerprint, "limpid.digest": one.digest}
    tags |= {"limpid.run": run, **provenance}
    if provenance["dvc.stage"] != SYNC or "limpid.evaluated" not in known.tags:
        tags["limpid.evaluated"] = str(started)
    for key, value in tags.items():
        client.set_model_version_tag(name, known.version, key, value)
    client.update_model_version(name, known.version, one.description)
    client.set_tag(run, "mlflow.note.content", one.description)
    _move_candidate(client, one, int(known.version))


def _move_candidate(client: Any, one: Registration, number: int) -> None:
    """Give the alias to the best of an evaluation; take it from what a newer evaluation judged."""
    found = versions(client, one.version_of)
    this = next(version for version in found if version.number == number)
    if this.superseded_by is not None:
        return
    if one.tags.get("limpid.candidate") == "yes":
        client.set_registered_model_alias(one.version_of, CANDIDATE, str(number))
        return
    holder = next((version for version in found if CANDIDATE in version.aliases), None)
    if holder is None or holder.evaluated >= this.evaluated:
        return
    if holder.defense == this.defense or this.supersedes(holder):
        client.delete_registered_model_alias(one.version_of, CANDIDATE)


def versions(client: Any, name: str) -> list[Version]:
    """Return all versions of a registered model, those with the highest robust accuracy first."""
    aliases: dict[int, list[str]] = {}
    import mlflow

    try:
        for alias, number in client.get_registered_model(name).aliases.items():
            aliases.setdefault(int(number), []).append(alias)
    except mlflow.exceptions.MlflowException:
        return []
    found = [
        Version(
            number=int(version.version),
            defense=version.tags.get("defense", "?"),
            aliases=tuple(sorted(aliases.get(int(version.version), []))),
            tags=dict(version.tags),
            source=version.source,
        )
        for version in client.search_model_versions(f"name = '{name}'")
    ]

    found = [replace(one, superseded_by=_superseding(one, found)) for one in found]

    def order(version: Version) -> float:
        accuracy = version.figure("robust_accuracy")
        return 1.0 if math.isnan(accuracy) else -accuracy

    return sorted(found, key=order)


def _superseding(one: Version, found: Sequence[Version]) -> int | None:
    """Return the number of the newest version that supersedes one, or None."""
    newer = [other for other in found if other.supersedes(one)]
    return max(newer, key=lambda other: other.evaluated).number if newer else None


def damage(version: Version) -> str:
    """Return what is missing or altered of a registered defense; "" if nothing is."""
    import mlflow
    from mlflow.models import Model

    # Both import torch, which the uploader does not need before it registers.
    from components.models.checkpoints import fingerprint
    from components.serving import seal

    with tempfile.TemporaryDirectory() as folder:
        try:
            home = Path(mlflow.artifacts.download_artifacts(version.source, dst_path=folder))
            flavour = Model.load(home).flavors["python_function"]
            parts = {key: home / part["path"] for key, part in flavour["artifacts"].items()}
            prints = [fingerprint(parts[key]) for key in ("classifier", "purifier")]
            whole = seal({"": home}, {})
        except (OSError, KeyError, DataError, mlflow.exceptions.MlflowException) as error:
            return f"its artifacts are not whole: {str(error).splitlines()[0][:200]}"
    config = flavour.get("config") or {}
    found = identity(prints, config.get("inference"), config.get("digest", ""))
    if found != version.tags.get("limpid.fingerprint"):
        return "its networks or settings are not those that were scored"
    if whole != version.tags.get("limpid.seal"):
        return "its code, settings or verdict are not those that were registered"
    figures = json.loads(version.tags.get("limpid.figures", "{}"))
    if (_worth(version.tags), _measured(figures)) != (config["scored"], config["figures"]):
        return "its tags do not say what its evaluation said"
    return ""


def identity(prints: Sequence[str], inference: Mapping[str, Any] | None, digest: str) -> str:
    """Return the fingerprint of a defense: of its folders, its inference, and `Defense.digest`.

    The last covers the code, so that changed code is another defense.
    """
    settings = json.dumps(inference, sort_keys=True) if inference else "none"
    return ":".join([*prints, settings, digest])


def promote(client: Any, name: str, version: Version, reason: str) -> None:
    """Make a version the champion, and keep the reason in a tag."""
    client.set_registered_model_alias(name, CHAMPION, str(version.number))
    client.set_model_version_tag(name, str(version.number), "limpid.champion_because", reason)


def _is(tags: Mapping[str, str], one: Registration) -> bool:
    """Whether a version with these tags is this defense with these figures, time aside."""
    figures = json.loads(tags.get("limpid.figures", "{}"))
    same = _measured(figures) == _measured(one.metrics) and _worth(tags) == _worth(one.tags)
    return same and tags.get("limpid.fingerprint") == one.fingerprint


def _measured(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name != TIME}


def _worth(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: tags.get(key, "") for key in WORTH}


def _add_version(client: Any, run: str, one: Registration) -> Any:
    import mlflow
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    from components.serving import seal

    code, served = Path(components.__file__).parent, Path(__file__).with_name("served_model.py")
    config = {
        "inference": one.inference, "digest": one.digest, "scored": _worth(one.tags),
        "figures": _measured(one.metrics),
    }  # fmt: skip
    config["seal"] = seal({**one.folders, "components": code, "served": served}, config)
    with mlflow.start_run(run_id=run), tempfile.TemporaryDirectory() as folder:
        logged = mlflow.pyfunc.log_model(
            name=one.name,
            python_model=str(served),
            artifacts={key: str(path) for key, path in one.folders.items()},
            model_config=config,
            code_paths=[str(code)],
            # Without what follows +, such as +cpu, which only some indices have.
            pip_requirements=[f"{n}=={installed(n).partition('+')[0]}" for n in REQUIRED],
        )
        home = mlflow.artifacts.download_artifacts(logged.model_uri, dst_path=folder)
        whole = seal({"": Path(home)}, {})
    with contextlib.suppress(mlflow.exceptions.MlflowException):
        client.create_registered_model(
            one.version_of,
            description="Defenses that were attacked and scored; `robust_accuracy` is the accuracy "
            "under the worst of all attacks, image by image.",
        )
    version = client.create_model_version(
        one.version_of, logged.model_uri, run, model_id=logged.model_id
    )
    client.set_model_version_tag(one.version_of, version.version, "limpid.seal", whole)
    # With this tag the table of models links to the registry.
    link = [{"name": one.version_of, "version": version.version}]
    client.set_logged_model_tags(logged.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(link)})
    return version


def _log_files(client: Any, run: str, one: Registration) -> None:
    for path in filter(Path.exists, one.artifacts):
        client.log_artifact(run, str(path.absolute()))
    with tempfile.TemporaryDirectory() as folder:
        for name, content in one.files.items():
            write_bytes(Path(folder) / name, content.encode())
        client.log_artifacts(run, folder)
