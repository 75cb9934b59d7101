"""One call of a stage: its options, as its command line gave them, and all parameters.

Options that begin with `out` are written, the other paths are read (`runner/command_line.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

from pipelines import layout
from pipelines.cluster import submission
from pipelines.config.resources import Resources
from pipelines.config.schema import Params
from pipelines.config.views import View
from pipelines.errors import ConfigError
from pipelines.runner.provenance import stage_key
from pipelines.storage import jobs
from pipelines.storage.jobs import Spec
from pipelines.storage.object_store import Listing
from pipelines.tracking.registry import Registration


def stage_of(module: Any) -> str:
    """Return the name that dvc.yaml has for the stage of a module."""
    return str(module.__name__.rpartition(".")[2])


def is_out(option: str) -> bool:
    """Return whether an option of a stage names an output."""
    return option == "out" or option.startswith("out_")


@dataclass(frozen=True)
class StageCall:
    """One stage, its options and all parameters.

    `in_store` are the options that were given as URIs of the store: their files need not be here.
    """

    module: Any
    options: Mapping[str, Any]
    in_store: frozenset[str]
    params: Params

    @classmethod
    def of(cls, module: Any, given: Mapping[str, str], params: Params) -> "StageCall":
        """Return the call with these options; ValueError for a URI that is not in the store."""
        options = {k: v if k == "name" else jobs.below_project(v) for k, v in given.items()}
        return cls(module, options, frozenset(k for k, v in given.items() if "://" in v), params)

    @property
    def stage(self) -> str:
        """The name of the stage in dvc.yaml."""
        return stage_of(self.module)

    @property
    def label(self) -> str:
        """The name that DVC has for the stage and its instance."""
        name = self.options.get("name")
        return f"{self.stage}@{name}" if name else self.stage

    @property
    def experiment(self) -> str:
        """The experiment of its runs in MLflow."""
        return f"limpid-{self.params.data.kind}"

    @property
    def resources(self) -> Resources:
        """The resources that it may use."""
        return self.params.resources.of(self.label)

    @property
    def outs(self) -> dict[str, Path]:
        """Its outputs, by option."""
        return {option: path for option, path in self.options.items() if is_out(option)}

    @property
    def deps(self) -> dict[str, Path]:
        """Its inputs, by option."""
        paths = {k: value for k, value in self.options.items() if isinstance(value, Path)}
        return {option: path for option, path in paths.items() if not is_out(option)}

    @cached_property
    def view(self) -> View:
        """The parameters that it sees; ConfigError for an instance that params.yaml lacks."""
        view_type: type[View] = get_type_hints(self.module.run)["params"]
        return view_type.of(self.params, self.options.get("name"))

    def key(self, inputs: Mapping[str, str]) -> str:
        """Return the key of its result, given the digests of its inputs by option."""
        return stage_key(self.module, self.view, inputs)

    def job_name(self, key: str) -> str:
        """Return the name that its job and its folder of work in progress have under a key."""
        return f"{self.label.replace('@', '-')}-{key[:12]}"

    def work(self, key: str) -> Path:
        """Return its folder of work in progress under a key."""
        return layout.WORK / self.job_name(key)

    def spec(self, key: str, deps: Mapping[str, Listing], outs: Mapping[str, Path]) -> Spec:
        """Describe it for a job that writes `outs`, with listings of its inputs by option.

        Raises ConfigError for a path outside of the project: a job has no such path.
        """
        options = {**self.options, **outs}
        for option, path in options.items():
            if isinstance(path, Path) and (path.is_absolute() or ".." in path.parts):
                raise ConfigError(
                    f"--{option} is {path}; a stage in a job takes paths below the project"
                )
        return Spec(
            stage=self.stage,
            options={option: str(value) for option, value in options.items()},
            deps={str(self.deps[option]): listing for option, listing in deps.items()},
            view=self.view.model_dump(mode="json", by_alias=True),
            resources=self.resources.model_dump(mode="json"),
            work=str(self.work(key)),
            versions=submission.versions(),
        )

    def registrations(self) -> list[Registration]:
        """Return the defenses to register once its outputs are in place."""
        if not hasattr(self.module, "registered"):
            return []
        found: list[Registration] = self.module.registered(
            self.view, self.params.data.kind, **self.options
        )
        return found
