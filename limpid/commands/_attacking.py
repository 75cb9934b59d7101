"""What `limpid attack` does with its options: read, judge, and say whether it passes."""

import os
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from components.data.digests import digest
from components.data.image_set import ImageSet, stratified
from components.data.shards import write_bytes
from components.sources.labelled import read_labelled
from limpid import comparing, junit
from limpid.comparing import Stored
from limpid.factory import networks_of
from limpid.given import read_given
from limpid.inputs import LEAST, as_threat
from limpid.judging import Verdict, judge
from limpid.junit import Case
from pipelines.cluster.submission import ADDRESS
from pipelines.config.yaml_files import read_yaml
from pipelines.errors import ConfigError, Failed
from pipelines.layout import METRICS
from pipelines.reporting.wording import percent

# So many test images are attacked where nobody says how many.
N = 1000


def attack(options: Namespace) -> int:
    """Judge the networks of a factory; raise Failed, with exit code 5, where they do not pass."""
    threat = as_threat(options.threat)
    every = read_labelled(options.data, "test")
    test = _some(every, options.n, options.seed)
    validation = _validation(options.validation, test)
    before = None if options.baseline is None else comparing.read(options.baseline)
    if before is not None:
        comparing.require_same(before, "this attack", threat.label, digest(test))
    given = {name: read_given(path, every, test) for name, path in options.rung.items()}
    ladder = _ladder(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, and torch sees no GPU here; leave it out, or say cpu")
    if os.environ.get(ADDRESS):
        print(
            f"this runs here, and not on the cluster that {ADDRESS} names; there, name the "
            "networks in the section `external` and run `dvc repro`"
        )
    if options.junit:
        # Now, and not after hours; an older file would say something else.
        write_bytes(options.junit, b"")
        options.junit.unlink()
    networks = networks_of(options.factory, options.unseen, options.weights)
    with ExitStack() as stack:
        out = options.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = judge(
            networks, test, validation, threat, ladder, options.batch, options.seed,
            options.device, out, given,
        )  # fmt: skip
        checks, bounds = junit.checks(found.metrics), _fail_under(found, options.fail_under)
        # The verdict took hours, so it is said before a comparison that may fail.
        _write(options.junit, [*checks, *bounds])
        _say(found, options, threat.label, len(every))
        if before is not None:
            now = comparing.read(f"{out / METRICS.name}:{found.name}")
            bounds.append(_beside(replace(now, title=found.name), before))
            _write(options.junit, [*checks, *bounds])
    for case in bounds:
        if case.outcome == "passed":
            print(case.detail)
    _require_passed(checks, bounds)
    return 0


def _write(path: Path | None, cases: Sequence[Case]) -> None:
    """Write test cases, where somebody wants them."""
    if path is not None:
        junit.write(path, cases)


def _ladder(options: Namespace) -> str | dict[str, Any]:
    """Return the ladder that is asked for, or the rungs of a file."""
    if options.ladder is None:
        return "quick" if options.quick else "standard"
    if not options.ladder.is_file():
        raise ConfigError(f"{options.ladder} is not there; name a YAML file of rungs")
    return read_yaml(options.ladder)


def _some(every: ImageSet, count: int | None, seed: int) -> ImageSet:
    """Return the images that are attacked, drawn in proportion to classes."""
    if len(every) < LEAST:
        raise ConfigError(f"there are {len(every)} test images; it takes {LEAST} or more")
    count = min(N, len(every)) if count is None else count
    if not LEAST <= count <= len(every):
        raise ConfigError(f"--n is {count}; it may be {LEAST} to {len(every)}, all that there are")
    return every[torch.from_numpy(stratified(every.labels.numpy(), count, seed))]


def _validation(path: Path | None, test: ImageSet) -> ImageSet | None:
    """Return validation images; their ids are no ids of test images."""
    if path is None:
        return None
    found = read_labelled(path, "val")
    if found.shape != test.shape:
        raise ConfigError(
            f"images of {path} are {found.shape}, and the test images {test.shape}; give both alike"
        )
    _require_same_classes(path, found.class_names, test.class_names)
    if torch.isin(found.ids, test.ids).any():
        found = replace(found, ids=found.ids - int(found.ids.min()) + int(test.ids.max()) + 1)
    return found


def _require_same_classes(path: Path, names: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    """Raise ConfigError where one label stands for two classes.

    Images without names of classes have 0, 1, ... for names: they agree with names that are words.
    """
    named = [some for some in (names, wanted) if some != tuple(map(str, range(len(some))))]
    words = any(not name.isdigit() for some in named for name in some)
    if names == wanted or not named or (len(named) == 1 and words):
        return
    pairs = enumerate(zip_longest(names, wanted, fillvalue="no class"))
    label, (here, there) = next((k, pair) for k, pair in pairs if pair[0] != pair[1])
    raise ConfigError(
        f"label {label} is {here} in {path} and {there} in the test images: classes are numbered "
        "in the order of their names, so give both the same classes"
    )


def _fail_under(found: Verdict, bound: float | None) -> list[Case]:
    """Hold the lower bound of robust accuracy to the least that is allowed, if there is one."""
    if bound is None:
        return []
    low = found.interval[0]
    said = f"the lower bound of robust accuracy, {low:.6g}, is {{}} --fail-under {bound:g}"
    if low < bound:
        return [Case(found.name, "fail_under", "failure", said.format("under"))]
    if found.upper_bound:
        said += "; but it is that of an upper bound, which can fail here and never proves anything"
    return [Case(found.name, "fail_under", "passed", said.format("not under"))]


def _beside(now: Stored, before: Stored) -> Case:
    """Compare with a verdict from before; a lower number fails, whatever it is a bound of."""
    found = comparing.compared(now, before)
    said = (
        f"{percent(now.headline.accuracy)} beside {percent(before.headline.accuracy)} of "
        f"{before.title}: {100 * found.mean:+.1f} points, paired 95 % interval "
        f"{100 * found.low:+.1f} to {100 * found.high:+.1f}; {found.gained} images stand better, "
        f"{found.lost} worse; one-sided p = {found.p_lower:.2g} that it is lower"
    )
    if now.headline.upper_bound:
        said += "; but the new number is an upper bound, so the true one may be lower still"
    if before.headline.upper_bound:
        said += "; but the baseline is an upper bound, so the true one may have been lower"
    return Case(now.title, "baseline", "failure" if found.lower else "passed", said)


def _say(found: Verdict, options: Namespace, threat: str, every: int) -> None:
    """Print the verdict below the table of scores."""
    head, bound = found.scored.headline, "at most " if found.upper_bound else ""
    print(
        f"\n{found.name}, {threat}, n = {head.n} of {every} test images, seed "
        f"{options.seed}: robust accuracy {bound}{percent(head.accuracy)} (95 % "
        f"{percent(head.low)} to {percent(head.high)})"
    )
    if found.scored.quick:
        print("a quick ladder gives an upper bound: the whole one may leave less")
    if found.not_asked:
        print(f"not asked, so it is no candidate: {', '.join(found.not_asked)}")
    if options.out:
        print(f"kept in {options.out}; {options.out / 'report.html'} has every attack and check")


def _require_passed(checks: Sequence[Case], bounds: Sequence[Case]) -> None:
    """Raise Failed where a check that blocks failed, or a bound is not kept."""
    failed = [case for case in checks if case.outcome == "failure"]
    said = [case.detail for case in bounds if case.outcome == "failure"]
    if failed:
        named = "; ".join(f"{case.about}: {case.name} ({case.detail})" for case in failed)
        said.insert(0, f"blocking checks failed, so the score is an upper bound: {named}")
    if said:
        raise Failed(5, "; ".join(said))
