"""What DVC shows agrees with the metrics: tables, headlines and a picture that needs no network."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import project
import pytest
from fake_evaluation import EVIL, PROBES, RIGHT, FakeEvaluation, N
from PIL import Image
from ruamel.yaml import YAML

from components.evaluation.counting import Effort
from pipelines.reporting.dvc_plots import write_headlines, write_plots
from pipelines.reporting.networks import trained
from pipelines.reporting.report import drawn, first_panels

PLAIN = [name for name in RIGHT if name != EVIL]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> FakeEvaluation:
    evaluation = FakeEvaluation(tmp_path_factory.mktemp("evaluation"))
    # Files are named after entries, and params.yaml would refuse this name.
    evaluation.metrics.defenses.pop(EVIL)
    return evaluation


@pytest.fixture(scope="module")
def reports(evaluation: FakeEvaluation) -> Path:
    out = evaluation.root / "reports"
    scored = evaluation.metrics.defenses
    pairs = [
        pair
        for pair in zip(evaluation.entries, evaluation.results, strict=True)
        if pair[0].name in PLAIN
    ]
    efforts = {entry.name: drawn(entry, scored[entry.name], result) for entry, result in pairs}
    models = list(trained(evaluation.models, evaluation.entries, evaluation.plan))
    entries, results = zip(*pairs, strict=True)
    panels = first_panels(entries, results, scored, evaluation.plan)
    write_plots(out / "plots", evaluation.metrics, efforts, models, panels)
    write_headlines(out / "headlines", evaluation.metrics)
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_table_of_the_ladder_has_the_scores_of_the_metrics(
    evaluation: FakeEvaluation, reports: Path
) -> None:
    ladder = {row["step"]: float(row["accuracy"]) for row in rows(reports / "plots/ladder.csv")}
    for name in PLAIN:
        found = evaluation.metrics.defenses[name]
        assert ladder[f"{name}, clean"] == found.clean.accuracy
        assert ladder[f"{name}, robust accuracy"] == found.headline.accuracy
        for rung, score in found.rungs.items():
            assert ladder[f"{name}, {rung}"] == score.accuracy


def test_the_pictures_are_those_the_report_shows_first(
    evaluation: FakeEvaluation, reports: Path
) -> None:
    written = {path.stem: Image.open(path) for path in (reports / "plots/pictures").glob("*.png")}
    assert written and set(written) <= set(PLAIN)
    known = zip(evaluation.entries, evaluation.results, strict=True)
    panels = {entry.name: result.panels for entry, result in known}
    for name, picture in written.items():
        shown = next(iter(panels[name].values()))
        wide, high = shown.side
        assert picture.size == (wide * len(shown.labels), high * len(shown.rows))


def test_the_picture_of_the_ladder_draws_every_step(
    evaluation: FakeEvaluation, reports: Path
) -> None:
    svg = (reports / "plots/ladder.svg").read_text()
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "") and "<script" not in svg
    for name in PLAIN:
        for rung, score in evaluation.metrics.defenses[name].rungs.items():
            assert f"{name}, {rung}: {100 * score.accuracy:.1f} %" in svg
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="12"', svg)]
    heads = [evaluation.metrics.defenses[name].headline.accuracy for name in PLAIN]
    assert widths == pytest.approx([480 * head for head in heads], abs=0.06)
    # The full rung of `rounded` is void.
    (dashed,) = re.findall(r"<circle [^>]*dasharray[^>]*><title>(.*?):", svg)
    assert dashed == "rounded, full"


def test_curves_are_written_as_tables(evaluation: FakeEvaluation, reports: Path) -> None:
    probed = rows(reports / "plots/radius/noisy.csv")
    assert {row["radius"]: float(row["accuracy"]) for row in probed} == {
        f"{float(radius)}": accuracy for radius, accuracy in PROBES["noisy"].items()
    }
    (left,) = rows(reports / "plots/radius/student_grey.csv")
    assert float(left["radius"]) == 0 and float(left["accuracy"]) == 1 and int(left["n"]) == N
    standing = rows(reports / "plots/compute/none.csv")
    assert [float(standing[i]["standing"]) for i in (0, -1)] == pytest.approx([11 / 12, 8 / 12])
    names = sorted(path.stem for path in (reports / "plots/compute").iterdir())
    assert names == ["none", "student_grey"]
    history = rows(reports / "plots/training/teacher.csv")
    assert [(row["epoch"], row["loss"]) for row in history] == [("1", "2.0"), ("2", "0.125")]
    assert not (reports / "plots/training/forgotten.csv").exists()


def test_headlines_are_few_numbers_of_the_metrics(
    evaluation: FakeEvaluation, reports: Path
) -> None:
    for name in PLAIN:
        few = json.loads((reports / f"headlines/{name}.json").read_text())
        found = evaluation.metrics.defenses[name]
        assert few["robust_accuracy"] == found.headline.accuracy and len(few) <= 7
        assert few["white_box"] == found.white_box.accuracy
        assert few["blocking_failed"] == len(found.checks.blocking_failed)
        assert few["warnings"] == len(found.checks.warnings)


def test_sets_together_leave_the_images_that_none_of_them_fooled() -> None:
    one = Effort(np.array([5, 50, 50, 50]), np.array([True, False, True, False]))
    two = Effort(np.array([9, 9, 9, 100]), np.array([True, True, False, False]))
    both = Effort.together([one, two])
    assert both.passes.tolist() == [5, 9, 50, 100]
    assert both.fooled.tolist() == [True, True, True, False]


def test_dvc_finds_every_plot_and_every_headline(reports: Path, tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "project")
    shutil.copytree(reports, folder / "reports")
    code, printed = project.run(folder, "dvc", "plots", "show", "--json")
    assert code == 0, printed
    shown = json.loads(printed[printed.index("{") :])
    assert not shown.get("errors")
    files = {f"reports/{path.relative_to(reports)}" for path in reports.glob("plots/**/*.*")}
    assert set(shown["data"]) == files
    code, printed = project.run(folder, "dvc", "metrics", "show", "--json")
    found = json.loads(printed[printed.index("{") :])[""]["data"]
    assert {Path(path).stem for path in found} == set(PLAIN)


def test_evaluate_writes_all_that_dvc_plots() -> None:
    dvc = YAML(typ="safe", pure=True).load((project.ROOT / "dvc.yaml").read_text())
    plotted = [next(iter(plot)) if isinstance(plot, dict) else plot for plot in dvc["plots"]]
    assert plotted and all(plot.startswith("reports/plots/") for plot in plotted)
    assert "reports/plots" in dvc["stages"]["evaluate"]["outs"]
