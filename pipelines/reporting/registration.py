"""What is registered of every scored defense: figures, tags, a description and files.

All of it is read from the metrics of an evaluation and the model folders it scored, so that another
store can be filled without scoring anything again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from components.data.shards import DataError
from components.models.checkpoints import fingerprint, read_card
from pipelines.config import dvc_lock
from pipelines.config.meanings import MEANINGS
from pipelines.config.sections import Defended
from pipelines.config.yaml_files import read_yaml
from pipelines.layout import DVC_LOCK, PARAMS, PICTURES, REPORT, STANDARD
from pipelines.reporting.networks import describe_subject
from pipelines.reporting.wording import (
    ROBUST,
    describe_threat,
    illusion,
    not_beaten,
    verdict,
    written_for,
)
from pipelines.storage import timings
from pipelines.tasks.metrics import (
    Estimate,
    Headline,
    Metrics,
    Scored,
    ThreatModel,
    rung_of,
)
from pipelines.tasks.subject import Subject
from pipelines.tracking.registry import NO_CHAMPION, Registration, identity


def registrations(
    defenses: Mapping[str, Defended], metrics: Metrics, models: Path, dataset: str
) -> list[Registration]:
    """Describe every trained defense; the best that may be the champion is the candidate.

    Defenses in front of other classifiers than the first are registered and never the candidate:
    what a robust classifier withstands by itself is no merit of a purifier.

    Raises DataError where weights, settings or code are not those that were scored.
    """
    found = {name: metrics.defenses[name] for name in defenses}
    sound = {
        name: one
        for name, one in found.items()
        if defenses[name].classifier == Path(STANDARD).name
        and not one.checks.blocking_failed
        and one.verdict
        and one.verdict.standing not in NO_CHAMPION
    }
    best = max(sound, key=lambda name: sound[name].headline.low, default=None)
    return [
        _registration(
            name, defended, found[name], metrics.threat_model, models, dataset, name == best
        )
        for name, defended in defenses.items()
    ]


def _registration(
    name: str, defended: Defended, found: Scored, threat: ThreatModel, models: Path, dataset: str,
    best: bool,
) -> Registration:  # fmt: skip
    folders = {"classifier": models / defended.classifier, "purifier": models / defended.model}
    inference = defended.inference.model_dump(mode="json") if defended.inference else None
    subject = Subject(folders["classifier"], folders["purifier"], inference=defended.inference)
    if subject.defense().digest != found.digest:
        raise DataError(
            f"{name} is not what was scored: its weights, settings or code have changed since; "
            "`dvc repro` scores it again"
        )
    prints = [fingerprint(folder) for folder in folders.values()]
    return Registration(
        name=name,
        version_of=f"limpid-{dataset}",
        fingerprint=identity(prints, inference, found.digest),
        digest=found.digest,
        folders=folders,
        inference=inference,
        params={
            "defense": defended.model_dump(mode="json", by_alias=True) | {"ladder": _ladder(found)},
            "network": read_card(folders["purifier"]).model,
        },
        metrics=_figures(name, found),
        tags={
            "defense": name,
            "robust accuracy": f"{_short(found.headline)}, worst of all attacks",
            "clean": _short(found.clean),
            "standing": found.verdict.standing if found.verdict else "",
            "verdict": verdict(found),
            "attacks written for this defense": written_for(found),
            "measurement valid": "no" if found.checks.blocking_failed else "yes",
            "blocking_failed": ", ".join(found.checks.blocking_failed),
            "warnings": found.checks.warned()[:4000],
            "threat": json.dumps(threat.model_dump(mode="json"), sort_keys=True),
            "limpid.candidate": "yes" if best else "no",
            **{f"dvc.lock.{path}": md5 for path, md5 in _locked(folders.values()).items()},
        },
        description=describe(name, describe_subject(subject), found, threat),
        artifacts=[REPORT, PARAMS, PICTURES / f"{name}.png"],
        files={"scores.json": json.dumps(found.model_dump(mode="json"), indent=1, sort_keys=True)},
    )


def require_unchanged(defenses: Mapping[str, Defended], models: Path) -> None:
    """Raise DataError where dvc.lock lists other parameters or model folders than are here.

    Raises ConfigError where it is damaged.

    The digest of a defense does not cover what is beside its weights, such as names of classes.
    """
    named = [name for one in defenses.values() for name in (one.classifier, one.model)]
    folders = [models / name for name in dict.fromkeys(named)]
    for name, md5 in _locked(folders).items():
        if folder_md5(models / Path(name).name) != md5:
            raise DataError(f"{name} is not what {DVC_LOCK} lists: `dvc repro` makes it again")
    evaluated = dvc_lock.stages().get("evaluate", {}).get("params", {}).get(str(PARAMS), {})
    now = read_yaml(PARAMS)
    if other := [section for section, value in evaluated.items() if now.get(section) != value]:
        raise DataError(
            f"{PARAMS} has other values of {', '.join(other)} than were evaluated: `dvc repro` "
            "evaluates these"
        )


def folder_md5(folder: Path) -> str:
    """Return the md5 of a folder as DVC lists it: of the names and md5 of all its files."""
    files = [
        {
            "md5": hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest(),
            "relpath": path.relative_to(folder).as_posix(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    listing = json.dumps(files, sort_keys=True).encode()
    return f"{hashlib.md5(listing, usedforsecurity=False).hexdigest()}.dir"


def _ladder(found: Scored) -> dict[str, list[str]]:
    """Return the attacks that were counted, by rung."""
    ladder: dict[str, list[str]] = {}
    for name, score in found.attacks.items():
        ladder.setdefault(rung_of(name), []).append(score.label)
    return ladder


def describe(name: str, subject: str, found: Scored, threat: ThreatModel) -> str:
    """Say of one defense what it is worth, for readers who do not know the code."""
    head, clean = found.headline, found.clean
    sentences = [
        f"**{name}**: {subject}.",
        f"{clean.accuracy:.1%} of {clean.n} clean test images are right; {ROBUST}: "
        f"{head.accuracy:.1%} (95 % interval {head.low:.1%} to {head.high:.1%}), the worst of "
        f"{len(found.attacks)} attacks chosen image by image. The attacker: "
        f"{describe_threat(threat)}.",
        f"Verdict: {verdict(found)}. Attacks written for this defense: {written_for(found)}. "
        f"Of its checks: {found.checks.warned()}.",
    ]
    if found.checks.blocking_failed:
        sentences.append("**A blocking check failed: this is an upper bound and no result.**")
    sentences += [
        f"- {finding.name}: {MEANINGS.get(finding.check, '')}"
        for finding in found.checks.failed()
        if finding.level == "block"
    ]
    rungs = [f"{rung} {score.accuracy:.1%}" for rung, score in found.rungs.items()]
    sentences.append(f"By what the attacker knows: {', '.join(rungs)}.")
    sentences += [sentence for sentence in (illusion(name, found),) if sentence]
    rivals = not_beaten(found)
    if rivals:
        sentences.append(f"It {rivals}.")
    return "\n\n".join(sentences)


def _short(score: Estimate) -> str:
    low, high = 100 * score.low, 100 * score.high
    bound = "at most " if isinstance(score, Headline) and score.upper_bound else ""
    return f"{bound}{100 * score.accuracy:.1f} % ({low:.1f} to {high:.1f}), n = {score.n}"


def _figures(name: str, found: Scored) -> dict[str, float]:
    head, clean = found.headline, found.clean
    figures = {
        "robust_accuracy": head.accuracy,
        "robust_accuracy_low": head.low,
        "robust_accuracy_high": head.high,
        "clean": clean.accuracy,
        "clean_low": clean.low,
        "clean_high": clean.high,
        "n": head.n,
        "blocking_failed_count": len(found.checks.blocking_failed),
        "warnings_count": len(found.checks.warnings),
        **{f"rung_{rung}": score.accuracy for rung, score in found.rungs.items()},
    }
    seconds = timings.known(image_of(name))
    return figures if seconds is None else {**figures, "ms_per_image": 1000 * seconds}


def image_of(name: str) -> str:
    """Return the title in reports/timings.json of the time that one image of a defense takes."""
    return f"one image of {name}"


def _locked(folders: Iterable[Path]) -> dict[str, str]:
    """Return the md5 of each of these outs in dvc.lock; those it does not have are left out."""
    outs = dvc_lock.outs()
    names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    return {name: outs[name] for name in names if name in outs}
