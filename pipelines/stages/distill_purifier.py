"""Distil a purifier from one or two teachers.

Reads data/{train,val}, the classifier, the pool and the teachers, writes models/<student>.
"""

from pathlib import Path

from pipelines.config.sections import Student
from pipelines.config.views import TrainingView
from pipelines.runner.context import Context
from pipelines.tasks import training


class StudentParams(TrainingView):
    """One entry of `students`, and the threat it is trained against."""

    student: Student
    tracks = {**TrainingView.tracks, "student": "students.{name}"}


def run(
    params: StudentParams,
    context: Context,
    *,
    name: str,
    train: Path,
    val: Path,
    classifier: Path,
    pool: Path,
    first_teacher: Path,
    last_teacher: Path,
    out: Path,
) -> dict[str, float]:
    """Distil the student called `name`; with one teacher, the first is the last."""
    section = params.student
    return training.train(
        name,
        "purifier",
        section.model,
        section,
        params,
        context,
        out,
        train=train,
        val=val,
        classifier=classifier,
        pool=pool,
        teachers=list(dict.fromkeys((first_teacher, last_teacher))),
    )
