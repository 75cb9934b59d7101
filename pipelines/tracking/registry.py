"""The model registry of MLflow: every scored defense is a version of one registered model.

A version is identified by the fingerprint of its networks and settings. It carries its figures, the
checks it failed and a description. Registering moves the alias `candidate`; only a person moves
`champion`, and a version is verified byte by byte before.
"""

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.data.shards import DataError, write_bytes
from pipelines.layout import MLFLOW_DB
from pipelines.storage.locks import lock

CHAMPION, CANDIDATE = "champion", "candidate"


@dataclass(frozen=True)
class Registration:
    """A defense to register: its folders, figures and description.

    `inference` says how the network of the purifier folder is used. `artifacts` are files on disk,
    `files` the contents of others by name; both are logged in the run of the defense.
    """

    name: str
    version_of: str
    fingerprint: str
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

    def figure(self, name: str) -> float:
        """Return the figure of this name; NaN where there is none."""
        return float(json.loads(self.tags.get("limpid.figures", "{}")).get(name, "nan"))

    @property
    def failed(self) -> list[str]:
        """The names of the blocking checks that failed."""
        return [name for name in self.tags.get("blocking_failed", "").split(", ") if name]


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


def register(client: Any, run: str, one: Registration, provenance: Mapping[str, str]) -> None:
    """Register a defense, once per fingerprint; later calls renew figures, tags and description.

    Figures and files are logged in `run` at every call.
    """
    import mlflow

    name, known = one.version_of, None
    with contextlib.suppress(mlflow.exceptions.MlflowException):
        known = next(
            (
                version
                for version in client.search_model_versions(f"name = '{name}'")
                if version.tags.get("limpid.fingerprint") == one.fingerprint
            ),
            None,
        )
    if known is None:
        known = _add_version(client, run, one)
    mlflow.log_metrics(dict(one.metrics), run_id=run, model_id=known.model_id)
    _log_files(client, run, one)
    # The page of a model lists tags in this order: those for people come first.
    tags = {**one.tags, "limpid.figures": json.dumps(dict(one.metrics))}
    tags |= {"limpid.fingerprint": one.fingerprint, "limpid.run": run, **provenance}
    for key, value in tags.items():
        client.set_model_version_tag(name, known.version, key, value)
    client.update_model_version(name, known.version, one.description)
    client.set_tag(run, "mlflow.note.content", one.description)
    if one.tags.get("limpid.candidate") == "yes":
        client.set_registered_model_alias(name, CANDIDATE, known.version)


def versions(client: Any, name: str) -> list[Version]:
    """Return all versions of a registered model, those with the best headline first."""
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
    return sorted(found, key=lambda version: -version.figure("headline"))


def damage(version: Version) -> str:
    """Return what is missing or altered of a registered defense; "" if nothing is."""
    import mlflow
    from mlflow.models import Model

    # Imports torch, which the uploader does not need.
    from components.models.checkpoints import fingerprint

    with tempfile.TemporaryDirectory() as folder:
        try:
            home = Path(mlflow.artifacts.download_artifacts(version.source, dst_path=folder))
            flavour = Model.load(home).flavors["python_function"]
            parts = {key: home / part["path"] for key, part in flavour["artifacts"].items()}
            prints = [fingerprint(parts[key]) for key in ("classifier", "purifier")]
        except (OSError, KeyError, DataError, mlflow.exceptions.MlflowException) as error:
            return f"its artifacts are not whole: {str(error).splitlines()[0][:200]}"
    settings = (flavour.get("config") or {}).get("inference")
    if identity(prints, settings) != version.tags.get("limpid.fingerprint"):
        return "its networks or settings are not those that were scored"
    return ""


def identity(prints: Sequence[str], inference: Mapping[str, Any] | None) -> str:
    """Return the fingerprint of a defense, from those of its folders and its inference."""
    return ":".join([*prints, json.dumps(inference, sort_keys=True) if inference else "none"])


def promote(client: Any, name: str, version: Version, reason: str) -> None:
    """Make a version the champion, and keep the reason in a tag."""
    client.set_registered_model_alias(name, CHAMPION, str(version.number))
    client.set_model_version_tag(name, str(version.number), "limpid.champion_because", reason)


def _add_version(client: Any, run: str, one: Registration) -> Any:
    import mlflow
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    with mlflow.start_run(run_id=run):
        logged = mlflow.pyfunc.log_model(
            name=one.name,
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={key: str(path) for key, path in one.folders.items()},
            model_config={"inference": one.inference},
            code_paths=["components"],
            pip_requirements=["torch", "safetensors", "pydantic", "numpy", "pyarrow"],
        )
    with contextlib.suppress(mlflow.exceptions.MlflowException):
        client.create_registered_model(
            one.version_of,
            description="Defenses that were attacked and scored; `headline` is the accuracy under "
            "the worst of all attacks, image by image.",
        )
    version = client.create_model_version(
        one.version_of, logged.model_uri, run, model_id=logged.model_id
    )
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
