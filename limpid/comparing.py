"""Two verdicts on the same images beside each other: a paired interval and the paired test."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from components.attacks import L2, Linf
from components.checks.verdicts import difference, higher
from components.data.shards import DataError
from components.probes.contract import SIGNIFICANT, Accuracies
from components.probes.statistics import Z95
from pipelines.commands.scores import read as read_metrics
from pipelines.errors import ConfigError, near
from pipelines.layout import METRICS
from pipelines.reporting.wording import interval, percent
from pipelines.stages.evaluate import IMAGES, ROBUST
from pipelines.tasks.metrics import Headline, Metrics, ThreatModel


@dataclass(frozen=True)
class Stored:
    """A verdict that was written: the headline of one row, and what it is about.

    `right` (N,) is how often each test image is classified right under the worst attack, in the
    order of the `ids` (N,); `images` is the digest of the test images (`digests.digest`).
    """

    title: str
    threat: str
    images: str
    ids: npt.NDArray[np.int64]
    right: Accuracies
    headline: Headline

    def sentence(self) -> str:
        """Say what it is: robust accuracy and its interval."""
        bound = "at most " if self.headline.upper_bound else ""
        return f"{self.title}: {bound}{percent(self.headline.accuracy)} ({interval(self.headline)})"


@dataclass(frozen=True)
class Comparison:
    """One verdict less another: the mean with its paired 95 % interval, in [-1,1].

    `gained` and `lost` count the images on which the first is right more often, and less often;
    `p_higher` and `p_lower` are the one-sided p-values that it is higher, and lower.
    """

    mean: float
    low: float
    high: float
    gained: int
    lost: int
    p_higher: float
    p_lower: float

    @property
    def lower(self) -> bool:
        """Whether the first is significantly lower."""
        return self.p_lower < SIGNIFICANT


def read(given: str) -> Stored:
    """Return a verdict that `limpid.evaluate` or a project wrote.

    It is named by the folder or its metrics.json; `PATH:NAME` says which row, where there is more
    than one defense. Raises ConfigError and DataError, in one sentence, for anything else.
    """
    path, name = _metrics_of(given)
    found = read_metrics(path)
    name = _row(name, found, path)
    scores, headline = path.with_name("scores.parquet"), found.defenses[name].headline
    try:
        table = pq.read_table(
            scores,
            # An attack may have the name of the headline, but no attack is without a mode.
            filters=[
                ("defense", "=", name),
                ("attack", "=", ROBUST),
                ("mode", "=", ""),
                ("role", "=", "score"),
            ],
        )
        images = (table.schema.metadata or {}).get(IMAGES, b"").decode()
        table = table.sort_by("id")
        ids, right, draws = (table[key].to_numpy() for key in ("id", "correct", "draws"))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{scores} cannot be read: {str(error).splitlines()[0]}") from None
    if not images or not len(ids):
        raise DataError(
            f"{scores} has no robust accuracy of single images; it takes the Limpid of today to "
            f"evaluate {name} again"
        )
    accuracies: Accuracies = right / draws
    if len(ids) != headline.n or abs(float(accuracies.mean()) - headline.accuracy) > 1e-9:
        raise DataError(f"{scores} and {path.name} are not of one evaluation")
    return Stored(
        f"{path.parent}:{name}", _ball(found.threat_model).label, images, ids, accuracies, headline
    )


def compared(one: Stored, other: Stored) -> Comparison:
    """Compare two verdicts; raise ConfigError where they are about something else."""
    require_same(one, other.title, other.threat, other.images)
    mean, low, high = difference(one.right, other.right, Z95)
    return Comparison(
        mean, low, high,
        gained=int((one.right > other.right).sum()), lost=int((one.right < other.right).sum()),
        p_higher=higher(one.right, other.right), p_lower=higher(other.right, one.right),
    )  # fmt: skip


def require_same(one: Stored, title: str, threat: str, images: str) -> None:
    """Raise ConfigError unless a verdict is about this threat, and about these very images."""
    if one.threat != threat:
        raise ConfigError(
            f"{one.title} is about {one.threat} and {title} about {threat}: two threats cannot be "
            "compared"
        )
    if one.images != images:
        raise ConfigError(
            f"{one.title} and {title} are about other test images (ids, labels or pixels differ): "
            "attack both with the same --data, --n and --seed"
        )


def claims(one: Stored, other: Stored, found: Comparison) -> list[str]:
    """Return what may be claimed, in sentences: an upper bound is never shown to be higher."""
    said = []
    for high, low, p in ((one, other, found.p_higher), (other, one, found.p_lower)):
        if p < SIGNIFICANT and high.headline.upper_bound:
            said.append(
                f"{high.title} shows the higher number (p = {p:.2g}), but it is an upper bound, so "
                "nothing says that it is higher"
            )
        elif p < SIGNIFICANT:
            said.append(f"{high.title} is higher than {low.title} (p = {p:.2g})")
    return said or [f"not told apart: neither is higher at p < {SIGNIFICANT}"]


def _ball(threat: ThreatModel) -> Linf | L2:
    if threat.norm == "linf":
        return Linf(norm="linf", eps_255=threat.eps_255)
    return L2(norm="l2", eps_l2=threat.eps_l2)


def _metrics_of(given: str) -> tuple[Path, str]:
    """Return the path of metrics, and the name of the row behind the last colon, if any."""
    path, name = Path(given), ""
    if not path.exists() and ":" in given:
        before, _, name = given.rpartition(":")
        path = Path(before)
    if path.is_file():
        return path, name
    places = [path / METRICS.name, path / METRICS]
    for place in places:
        if place.is_file():
            return place, name
    problem = f"has neither {METRICS.name} nor {METRICS}" if path.exists() else "is not there"
    raise ConfigError(f"{path} {problem}; name a folder with a verdict, or its metrics.json")


def _row(name: str, found: Metrics, path: Path) -> str:
    """Return the name of a row: the one given, or the only defense, or the only classifier."""
    if name and name not in found.defenses:
        hint = near(name, found.defenses) or f"; it has {', '.join(found.defenses)}"
        raise ConfigError(f"{path} has no {name}{hint}")
    for role in ("defense", "baseline"):
        rows = [known for known, one in found.defenses.items() if one.role == role]
        if not name and len(rows) == 1:
            return rows[0]
        if not name and rows:
            raise ConfigError(f"{path} has {', '.join(rows)}; write {path}:NAME to say which")
    return name
