"""The form of reports/metrics.json: `evaluate` writes it, everything else reads it by `read`.

Some values are sentences for people. The facts of each sentence stand beside it as numbers and
names, and programs read only those. A set is named rung/attack, for example `full/pgd`.

Every change of the form raises `SCHEMA_VERSION`. Values that contradict each other are refused.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from components.config import Config
from components.data.shards import DataError, write_json
from pipelines.config import dvc_lock
from pipelines.layout import DVC_LOCK

SCHEMA_VERSION: Final = 5
EntryRole = Literal["baseline", "defense", "control"]
# As in `components.checks.verdicts`: readers of the metrics need not load what computes them.
Standing = Literal[
    "above", "below", "not told apart", "no better than a control", "broken", "no comparison",
    "not measured",
]  # fmt: skip


class Estimate(Config):
    """An accuracy in [0,1] with its Wilson 95 % interval; `n` counts images, never draws."""

    accuracy: float
    low: float
    high: float
    n: int


class Headline(Estimate):
    """Robust accuracy (worst of all attacks).

    An upper bound where a blocking check failed, and on a quick ladder.
    """

    upper_bound: bool


class CleanScore(Estimate):
    """The accuracy on clean images.

    `agreement` is how often the prediction is that of the bare classifier on the clean image.
    """

    agreement: float


class AttackScore(Estimate):
    """The accuracy on one stored set, and what tables call its attack (`label`).

    `agreement` is how often the prediction is that of the bare classifier on the clean image;
    `region` is the threat that the attack stays inside by itself, "" where it minimises a distance;
    `bounded`: that is the primary one; `inside`: the fraction of its images that lie in this ball;
    `median_l2`: the median L2 distance to the clean images, in pixels of [0,1].
    """

    agreement: float
    label: str
    region: str
    bounded: bool
    inside: float
    median_l2: float


class RadiusPoint(Estimate):
    """The accuracy of the probe at `radius` times the radius of the threat."""

    radius: float


class IllusoryRung(Config):
    """A rung that shows the accuracy `seen`, where white-box attacks leave only `left`."""

    rung: str
    seen: float
    left: float


class Rival(Config):
    """A control or bare classifier that a defense does not beat: accuracy difference, p-value."""

    difference: float
    p: float


class Difference(Config):
    """Robust accuracy less that of `baseline`, its paired 99 % interval and two-sided p-value."""

    baseline: str
    difference: float
    low: float
    high: float
    p: float


class Verdict(Config):
    """How a defense stands beside the other entries, as in `components.checks.verdicts`.

    `rivals` are those that it does not beat, or the baseline it is compared with; without a
    comparison, the baselines whose adversarial training does not beat no defense;
    `adversarial_training` is the comparison with such a baseline, None where there is none.
    """

    standing: Standing
    rivals: list[str]
    adversarial_training: Difference | None


class Retries(Config):
    """Accuracies under the rules of ten tries, on the worst and on the clean images."""

    worst_of_10: Estimate
    majority_of_10: Estimate
    clean_worst_of_10: Estimate
    clean_majority_of_10: Estimate


class UnseenClassifier(Config):
    """Accuracies of a classifier that played no part in training, behind the same purifier."""

    clean: Estimate
    worst_examples: Estimate


class SetDetection(Config):
    """How well the detector score separates one stored set from the clean images.

    `tpr_1` and `tpr_5` are the fractions rejected at the thresholds of 1 % and 5 %, `roc` holds
    (clean, attacked) fractions rejected, `control_auc` is that of the control.
    """

    auc: float
    control_auc: float
    tpr_1: float
    tpr_5: float
    roc: list[tuple[float, float]]


class Detection(Config):
    """A purifier as a detector; the keys "1" and "5" name the thresholds in per cent.

    `validation` counts the images that fix the thresholds; `curve` holds (clean images rejected,
    wrong answers let through).
    """

    validation: int
    clean_rejected: dict[str, Estimate]
    attacks: dict[str, SetDetection]
    detect_or_correct: dict[str, Estimate]
    curve: list[tuple[float, float]]


class RecordedFinding(Config):
    """The outcome of one check, named `check` or `check/about`; `about` is a rung or a set.

    One that was not `asked` lacked something that it needs, and has not passed.
    """

    name: str
    check: str
    about: str
    level: Literal["block", "warn"]
    passed: bool
    detail: str
    figures: dict[str, float]
    asked: bool


class Checks(Config):
    """All findings on one entry, and the names of those that failed, by level."""

    blocking_failed: list[str]
    warnings: list[str]
    findings: list[RecordedFinding]

    @model_validator(mode="after")
    def _names_are_those_of_findings(self) -> Self:
        for key, level in (("blocking_failed", "block"), ("warnings", "warn")):
            named = getattr(self, key)
            failed = [f.name for f in self.findings if not f.passed and f.level == level]
            if sorted(named) != sorted(failed):
                raise ValueError(
                    f"{key} names {', '.join(named) or 'none'}, and of its findings "
                    f"{', '.join(failed) or 'none'} failed"
                )
        return self

    def failed(self) -> list[RecordedFinding]:
        """Return the findings that failed, blocking ones first."""
        return sorted((f for f in self.findings if not f.passed), key=lambda f: f.level)

    def warned(self) -> str:
        """Say how many warnings there are, and which: `2 warnings: chance, selection`."""
        count = f"{len(self.warnings) or 'no'} warning{'' if len(self.warnings) == 1 else 's'}"
        return f"{count}: {', '.join(self.warnings)}" if self.warnings else count


class Elsewhere(Config):
    """What is left under a further threat: the worst of all sets inside it, also by rung."""

    headline: Headline
    rungs: dict[str, Estimate]


class Scored(Config):
    """The scores of one baseline, defense or control.

    Dictionaries are keyed by rung (`rungs`), by set (`attacks`, `carried_by`, where "clean" counts
    too), by class, or by the label of a further threat (`elsewhere`). `void_rungs` had no usable
    gradient. `radius_curve` is empty without a probe, and `unseen_classifier` None without one.
    `digest` identifies weights, settings and code that were scored; `written_for` are the attacks
    that were written for this entry. Only defenses have `not_better_than` and `verdict`; no other
    entry has these keys.
    """

    role: EntryRole
    digest: str
    stochastic: bool
    quick: bool
    clean: CleanScore
    headline: Headline
    per_class: dict[str, Estimate]
    carried_by: dict[str, int]
    rungs: dict[str, Estimate]
    void_rungs: list[str]
    white_box: Estimate | None
    attacks: dict[str, AttackScore]
    elsewhere: dict[str, Elsewhere]
    detection: Detection | None
    retries: Retries
    unseen_classifier: UnseenClassifier | None
    illusions: list[str]
    illusory_rungs: list[IllusoryRung]
    radius_curve: list[RadiusPoint]
    checks: Checks
    certificate: dict[str, dict[str, float]]
    written_for: list[str]
    not_better_than: dict[str, Rival] | None = None
    verdict: Verdict | None = None

    @model_validator(mode="after")
    def _headline_is_what_is_left(self) -> Self:
        failed, bound = self.checks.blocking_failed, self.headline.upper_bound
        if bound != (bool(failed) or self.quick):
            raise ValueError(
                f"headline.upper_bound is {str(bound).lower()}, and "
                f"{', '.join(failed) or 'no blocking check'} failed"
                f"{' on a quick ladder' if self.quick else ''}"
            )
        # The noise that selects the worst attack on a random defense is not that which scores it.
        if not self.stochastic:
            left = {"clean": self.clean, **self.rungs}
            left |= {n: one for n, one in self.attacks.items() if one.bounded and one.inside == 1}
            least = min(left, key=lambda name: left[name].accuracy)
            if self.headline.accuracy > left[least].accuracy + 1e-9:
                raise ValueError(
                    f"its headline is {self.headline.accuracy:.4g}, and {least} leaves "
                    f"{left[least].accuracy:.4g}"
                )
        return self

    @model_serializer(mode="wrap")
    def _leave_out_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        for key in ("not_better_than", "verdict"):
            if values[key] is None:
                del values[key]
        return values


class Selftest(Config):
    """How many planted faults and known cases the selftest tried, and how many came out right."""

    cases: int
    caught: int


class _ThreatModel(Config):
    n: int
    select_draws: int
    score_draws: int


class LinfThreat(_ThreatModel):
    """The ball of the maximum norm that all scores are about, the images and draws behind them."""

    norm: Literal["linf"]
    eps_255: float


class L2Threat(_ThreatModel):
    """The ball of the Euclidean norm that all scores are about, the images and draws."""

    norm: Literal["l2"]
    eps_l2: float


ThreatModel = Annotated[LinfThreat | L2Threat, Field(discriminator="norm")]


class PublishedFigures(Config):
    """What a paper prints of a defense: accuracies of `clean` and of sets."""

    source: str
    accuracy: dict[str, float]


class Metrics(Config):
    """All that is in reports/metrics.json; `defenses` holds baselines and controls, too."""

    schema_version: Literal[5] = SCHEMA_VERSION
    seed: int
    selftest: Selftest
    threat_model: ThreatModel
    published: dict[str, PublishedFigures]
    defenses: dict[str, Scored]


def read(path: Path) -> Metrics:
    """Return the metrics in a file.

    Raises FileNotFoundError where there is none, and DataError, in one sentence, for a file that
    is damaged or of another schema version.
    """
    try:
        content = path.read_bytes()
        found = json.loads(content)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path} cannot be read as metrics ({reason})") from None
    version = found.get("schema_version") if isinstance(found, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} has {'no schema version' if version is None else f'schema {version}'}, and "
            f"this Limpid reads schema {SCHEMA_VERSION}; `dvc repro` renews it"
        )
    try:
        return Metrics.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ")
        raise DataError(f"{path} is damaged ({where}: {problem}); `dvc repro` renews it") from None


def edited(path: Path) -> str:
    """Return what to do about a file that is not the one in dvc.lock; "" where it is, or none is.

    The lock lists the md5 of every output of a stage. Raises ConfigError where it is damaged.
    """
    listed = dvc_lock.outs().get(Path(os.path.relpath(path)).as_posix())
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if listed in (None, digest):
        return ""
    return (
        f"{path} is not what {DVC_LOCK} lists: it was edited, or made without DVC; `dvc repro` "
        "makes it again, `dvc commit -f evaluate` accepts what `limpid` evaluated or fetched"
    )


def read_unedited(path: Path) -> Metrics:
    """Return what `read` returns; raise DataError also where the file is not as DVC has it."""
    found = read(path)
    if problem := edited(path):
        raise DataError(problem)
    return found


def write(path: Path, metrics: Metrics) -> None:
    """Write the metrics as JSON with sorted keys: equal metrics give equal bytes."""
    write_json(path, metrics.model_dump(mode="json"))


def rung_of(name: str) -> str:
    """Return the rung of a set that is named rung/attack; of the clean images, "clean"."""
    return name.partition("/")[0]


def attack_of(name: str) -> str:
    """Return the attack of a set that is named rung/attack."""
    return name.rpartition("/")[2]
