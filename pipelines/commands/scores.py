"""Print the scores in reports/metrics.json, what is an illusion there, and where to look on."""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.reporting.wording import ROLES, describe_threat, illusion, not_beaten, void_rungs
from pipelines.runner.console import refuse

METRICS, REPORT = Path("reports/metrics.json"), Path("reports/report.html")
MLFLOW = "mlflow server --backend-store-uri sqlite:///mlflow.db --workers 1"
# Without the query the UI takes models for agents and hides their metrics.
UI = "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"
WIDTH = 80
NUMBERS = ("clean", "grey", "BPDA", "full", "headline, 95 %", "unseen", "rnd", "checks")
NOTES = (
    "All in % of n = {n} test images; {threat}. headline: worst of all attacks per image, with "
    "its Wilson interval (<= upper bound, a check failed). grey: the attacker sees only the "
    "classifier, which is never robust accuracy. unseen: a classifier that played no part in "
    "training, clean/same worst examples: a transfer. void: there was no gradient to follow. Other "
    "rungs and detection are in the report."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 if there are no metrics or they are damaged."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--metrics", type=Path, default=METRICS)
    path: Path = parser.parse_args(argv).metrics
    try:
        metrics = json.loads(path.read_bytes())
        scored: Mapping[str, Any] = metrics["defenses"]
        table = score_table(scored)
        names = ordered(scored)
        sentences = [illusion(name, scored[name]) for name in names]
        rivals = {name: not_beaten(scored[name]) for name in names}
        sentences += [f"{name} {said}." for name, said in rivals.items() if said]
        threat = metrics["threat_model"]
        notes = NOTES.format(n=threat["n"], threat=describe_threat(threat))
    except FileNotFoundError:
        return refuse(f"{path} does not exist; `dvc repro` makes it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return refuse(f"{path} is damaged or of another version ({reason}); `dvc repro` renews it")
    console = Console(highlight=False)
    # Narrower, the table would cut digits off, and a cut number is another number.
    console.width = max(console.width, WIDTH)
    console.print(table)
    console.print(Text(f"\n{notes}"), style="dim")
    for sentence in filter(None, sentences):
        console.print(Text(f"\n{sentence}", style="yellow"))
    console.print(f"\nReport:    {REPORT}", soft_wrap=True)
    console.print(f"MLflow UI: {MLFLOW}", soft_wrap=True)
    console.print(f"then open  {UI}", soft_wrap=True)
    return 0


def score_table(scored: Mapping[str, Any]) -> Table:
    """Return the table of metrics["defenses"], baselines first; it fits into WIDTH columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold")
    for title in NUMBERS:
        table.add_column(title, justify="right", no_wrap=True)
    names = ordered(scored)
    for name, after in zip_longest(names, names[1:]):
        ends = after is None or scored[after]["role"] != scored[name]["role"]
        table.add_row(Text(name), *_row(scored[name]), end_section=ends)
    return table


def ordered(scored: Mapping[str, Any]) -> list[str]:
    """Return the names in the order of their roles, the best headline first."""
    return sorted(
        scored, key=lambda n: (ROLES.index(scored[n]["role"]), -scored[n]["headline"]["accuracy"])
    )


def _row(found: Mapping[str, Any]) -> list[Text]:
    head, unseen, checks = found["headline"], found["unseen_classifier"], found["checks"]
    bound, failed = head["upper_bound"], len(checks["blocking_failed"])
    rungs = [_rung(found, mode) for mode in ("classifier", "bpda", "full")]
    headline = Text(f"{'<=' if bound else ''}{_number(head)} ", "strike" if bound else "bold")
    headline.append(f"{100 * head['low']:.1f}-{100 * head['high']:.1f}", "not bold dim")
    behind = "/".join(f"{100 * unseen[x]['accuracy']:.0f}" for x in ("clean", "worst_examples"))
    verdict = Text(f"{failed} bad", "red") if failed else Text("ok", "green")
    return [
        Text(_number(found["clean"])),
        *rungs,
        headline,
        Text(behind),
        Text("yes" if found["stochastic"] else "no"),
        verdict,
    ]


def _rung(found: Mapping[str, Any], mode: str) -> Text:
    """Return the accuracy on a rung, `-` where nothing was run, `void` without a gradient."""
    if mode in void_rungs(found):
        return Text("void", "red")
    return Text(_number(found["rungs"][mode]) if mode in found["rungs"] else "-")


def _number(score: Mapping[str, Any]) -> str:
    return f"{100 * score['accuracy']:.1f}"
