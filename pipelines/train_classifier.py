"""Reads data/{train,val}, writes a classifier as a model folder."""

from pathlib import Path

from pipelines import jobs
from pipelines.params import Classifier, ThreatView
from pipelines.stage import Context, main


class ClassifierParams(ThreatView):
    """One entry of `classifiers`, and the threat adversarial training holds against."""

    classifier: Classifier
    tracks = {**ThreatView.tracks, "classifier": "classifiers.{name}"}


def run(
    params: ClassifierParams, context: Context, *, name: str, train: Path, val: Path, out: Path
) -> dict[str, float]:
    """Train the classifier called `name`."""
    section = params.classifier
    return jobs.train(
        "classifier",
        section.model,
        section,
        params,
        context,
        out,
        train=train,
        val=val,
    )


if __name__ == "__main__":
    main(__spec__.name)
