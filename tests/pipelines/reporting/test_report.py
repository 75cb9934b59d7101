"""The report says what the metrics say, and nothing rosier."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_evaluation import CLASSES, EVIL, PROBES, RIGHT, FakeEvaluation, N, fail_checks

from components.attacks.contract import MODES
from components.evaluation.detection import CURVE
from components.models.checkpoints import ModelCard, build, fingerprint, save
from components.models.defense import STAND_INS
from components.models.purifiers.apudae import Apudae
from components.probes.statistics import wilson
from pipelines.config.meanings import MEANINGS
from pipelines.reporting import report
from pipelines.reporting.networks import describe_subject
from pipelines.reporting.wording import BLIND, settings
from pipelines.tasks.subject import Subject

APUDAE = Apudae(
    kind="apudae", steps=15, rate=0.05, optimiser="adam", target="minimum", scaled=False,
    noise_255=0.0, transform=None,
)  # fmt: skip


class Page(HTMLParser):
    """What a reader sees of a page, the links in it, and whether its tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: dict[str, int] = {}
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(text)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> FakeEvaluation:
    return FakeEvaluation(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def page(evaluation: FakeEvaluation) -> Page:
    return Page(evaluation.html())


def test_the_report_needs_no_other_file_and_no_network(
    evaluation: FakeEvaluation, page: Page
) -> None:
    html = evaluation.html()
    assert "http:" not in html and "https:" not in html and "@import" not in html
    assert page.links and all(link.startswith("#") for link in page.links)
    assert all(
        url.startswith("data:image/png;base64,") for url in re.findall(r"url\((.*?)\)", html)
    )
    assert not {"script", "link", "iframe", "img"} & page.tags.keys()
    assert not page.open


def test_equal_inputs_give_equal_bytes(evaluation: FakeEvaluation) -> None:
    assert evaluation.html() == evaluation.html()


def test_the_report_shows_the_measured_scores(page: Page) -> None:
    assert all(name in page.text for name in RIGHT)
    assert "51/255 = 0.2" in page.text and f"n = {N} test images" in page.text
    best = "Best defense without a failed blocking check: student_adaptive , 58.3 %"
    assert best in page.text
    assert "32.0\N{EN DASH}80.7, n = 12" in page.text


def test_illusions_are_described_in_a_sentence(evaluation: FakeEvaluation, page: Page) -> None:
    sentence = (
        "student_grey shows 91.7 % when the attacker ignores the purifier, 100.0 % when the "
        "attacker takes the purifier for the identity in the backward pass (BPDA), and 0.0 % when "
        "the attacker differentiates through it: the first two numbers are no robustness."
    )
    assert sentence in page.text
    alone = (
        "noisy shows 100.0 % when the attacker ignores the purifier, and 8.3 % when the attacker"
    )
    assert alone in page.text and "the first number is no robustness." in page.text
    assert "student_adaptive shows" not in page.text
    assert set(MODES) - {"full", "fixed_noise", *STAND_INS} == set(BLIND)


def test_an_attack_is_called_by_its_label(evaluation: FakeEvaluation) -> None:
    found = evaluation.values()
    before = section(evaluation.html(), "attacks")
    for one in found["defenses"].values():
        if "full/pgd" in one["attacks"]:
            one["attacks"]["full/pgd"]["label"] = "pgd (K<4)"
    after = section(evaluation.html(found), "attacks")
    assert "full gradient, pgd (K&lt;4)" in after and "(K&lt;4)" not in before


def test_an_upper_bound_is_struck_through(evaluation: FakeEvaluation) -> None:
    html = evaluation.html()
    (struck,) = re.findall(r'<s class="n">(.*?)</s>.*upper bound, check failed', html)
    assert struck == "100.0 %"
    assert "void: no usable gradient" in html


def test_a_warning_makes_a_rung_void_too(evaluation: FakeEvaluation, page: Page) -> None:
    html = evaluation.html()
    assert "gradient_present/full" in evaluation.metrics.defenses["rounded"].checks.warnings
    (row,) = re.findall(r'<th scope="row">rounded<small>.*?</tr>', html, re.DOTALL)
    assert "<s>100.0 %</s>" in row and "void: no usable gradient" in row
    assert '<strong class="n">25.0 %</strong>' in row and "upper bound" not in row
    assert "warning gradient_present/full" in page.text


def test_the_lowest_rung_that_is_not_void_is_bold(evaluation: FakeEvaluation) -> None:
    def bold(name: str) -> list[str]:
        pattern = rf'<th scope="row">{name}<small>.*?</tr>'
        row, *_ = re.findall(pattern, section(evaluation.html(), "scores"), re.DOTALL)
        return re.findall(r'<strong><span class="n">(.*?)</span>', row)

    assert bold("student_grey") == ["0.0 %"] and bold("student_adaptive") == ["58.3 %"]
    # Not its void full rung, which says nothing.
    assert bold("rounded") == ["25.0 %"]


def test_tables_list_the_stand_ins_that_were_run(evaluation: FakeEvaluation, page: Page) -> None:
    assert "soft stand\N{NON-BREAKING HYPHEN}in gradient as if rounding were soft" in page.text
    assert "soft stand-in, pgd 25.0 %" in page.text
    assert "A stand-in is what the attacker differentiates" in page.text
    assert not any(f"{mode} stand" in page.text for mode in set(STAND_INS) - {"soft"})
    row, *_ = re.findall(r'<th scope="row">student_adaptive<.*?</tr>', evaluation.html(), re.DOTALL)
    assert row.count("has none") == 1 and "rounded shows" not in page.text


def test_every_rung_has_a_title_for_its_column(evaluation: FakeEvaluation) -> None:
    found = evaluation.values()
    rungs = found["defenses"]["rounded"]["rungs"]
    rungs |= dict.fromkeys(MODES, rungs["full"])
    html = evaluation.html(found)
    words = Page(html).text
    assert all(f"{kind} stand\N{NON-BREAKING HYPHEN}in gradient" in words for kind in STAND_INS)


def test_a_subject_is_described_with_its_inference_and_the_training_of_its_classifier(
    tmp_path: Path,
) -> None:
    hardened = {
        "objective": {"kind": "adversarial_classification"},
        "threat": {"norm": "linf", "eps_255": 8.0},
    }
    trainings: dict[str, dict[str, Any]] = {
        "standard": {"objective": {"kind": "classification"}}, "robust": hardened, "yours": {}
    }  # fmt: skip
    for name, provenance in trainings.items():
        card = ModelCard(
            format=1, family="classifier", model={"kind": "small_cnn", "width": 1},
            shape=[1, 8, 8], class_names=["0", "1"], provenance=provenance,
        )  # fmt: skip
        save(tmp_path / name, build(card).eval(), card)
    subject = Subject(tmp_path / "robust", Path("models/denoiser"), inference=APUDAE)
    assert describe_subject(subject) == (
        "purifier denoiser used as apudae, steps 15, rate 0.05, optimiser adam, target minimum, "
        "scaled no, noise_255 0.0, transform none, in front of robust (trained by adversarial "
        "classification within linf 8/255)"
    )
    described = [describe_subject(Subject(tmp_path / name)) for name in ("standard", "yours")]
    assert described == [
        "bare classifier standard (trained on clean images)",
        "bare classifier yours (training unknown)",
    ]


def section(html: str, name: str) -> str:
    (found,) = re.findall(rf'<section id="{name}">.*?</section>', html, re.DOTALL)
    return str(found)


def test_the_detection_section_shows_the_measured_figures(evaluation: FakeEvaluation) -> None:
    html = evaluation.html()
    words = Page(section(html, "detection")).text
    assert '<a href="#detection">' in html
    assert "another claim than robust accuracy" in words
    assert "student_adaptive thresholds on 20 images" in words
    found = evaluation.metrics.defenses["student_adaptive"].detection
    row = re.search(r"full gradient, pgd (\S+) (\S+) (\S+) % (\S+) %", words)
    assert row and row.groups() == ("0.944", "0.778", "66.7", "75.0")
    # Of twelve, the five last are wrong under the worst attack; the eight last are rejected.
    counted = [found.clean_rejected[rate] for rate in ("1", "5")]
    counted += [found.detect_or_correct[rate] for rate in ("1", "5")]
    fractions = [f"{100 * score.accuracy:.1f} %" for score in counted]
    assert fractions == ["0.0 %", "8.3 %", "100.0 %", "100.0 %"]
    spans = [f"{100 * one.low:.1f}\N{EN DASH}{100 * one.high:.1f}" for one in counted]
    cells = " ".join(f"{one} {span}" for one, span in zip(fractions, spans, strict=True))
    assert cells in words


def test_the_tradeoff_is_drawn_from_the_curve(evaluation: FakeEvaluation) -> None:
    shown, after = section(evaluation.html(), "detection").split("ROC curves on test images")
    drawn = re.findall(r'<polyline points="(.*?) "/>', shown)
    curve = evaluation.metrics.defenses["noisy"].detection.curve
    # Half of the clean images and more are rejected, so that the axis ends at all of them.
    assert curve[-1][0] > 0.5 and "100 % of clean images rejected" in shown
    points = [(46 + 246 * x, 110 - 104 * y) for x, y in curve]
    assert len(drawn) == 2 and len(points) == len(CURVE)
    for point, (x, y) in zip(drawn[1].split(" "), points, strict=True):
        assert [float(value) for value in point.split(",")] == pytest.approx([x, y], abs=0.06)
    assert shown.count("<circle") == 4 and shown.count('<circle class="hollow"') == 2
    # Then every set of both as a ROC curve.
    attacks = [
        evaluation.metrics.defenses[n].detection.attacks for n in ("student_adaptive", "noisy")
    ]
    lines = re.findall(r'<polyline points="(.*?) "/>', after)
    sets = [seen for each in attacks for seen in each.values()]
    assert len(lines) == len(sets)
    for line, seen in zip(lines, sets, strict=True):
        points = [(44 + 364 * false, 8 + 150 * (1 - true)) for false, true in seen.roc]
        for point, (x, y) in zip(line.split(" "), points, strict=True):
            assert [float(value) for value in point.split(",")] == pytest.approx([x, y], abs=0.06)
        assert f"AUC {seen.auc:.3f}" in after


def test_a_detector_that_does_not_beat_the_control_is_named(page: Page) -> None:
    assert "from clean ones as well as, or better than, noisy on 2 of 2 sets." in page.text
    assert "student_adaptive on" not in page.text


def test_void_rungs_do_not_count_for_a_detector(evaluation: FakeEvaluation) -> None:
    found = evaluation.values()
    found["defenses"]["noisy"]["void_rungs"].append("full")
    html = evaluation.html(found)
    shown = section(html, "detection")
    assert "noisy on 1 of 1 sets" in shown and "<s>0.500</s>" in shown


def test_detect_or_correct_is_an_upper_bound_where_the_headline_is(
    evaluation: FakeEvaluation,
) -> None:
    found = evaluation.values()
    fail_checks(found["defenses"]["student_adaptive"], "planted")
    html = evaluation.html(found)
    assert section(html, "detection").count('<s class="n">100.0 %</s>') == 2


def test_the_detection_section_is_left_out_without_a_detector(evaluation: FakeEvaluation) -> None:
    found = evaluation.values()
    for one in found["defenses"].values():
        one["detection"] = None
    html = evaluation.html(found)
    assert "#detection" not in html and "Detect" not in Page(html).text


def test_the_probe_over_the_radius_is_drawn_with_its_intervals(evaluation: FakeEvaluation) -> None:
    found = section(evaluation.html(), "radius")
    words = Page(found).text
    assert "not its robust accuracy" in words and "on the first 16 test images" in words
    one, two = re.findall(
        r'<g class="h(\d)"><path d="(.*?)"/><polyline points="(.*?) "/></g>', found
    )
    assert (one[0], two[0]) == ("0", "1")
    heights = [float(point.split(",")[1]) for point in two[2].split(" ")]
    assert heights == pytest.approx([8 + 150 * (1 - y) for y in PROBES["noisy"].values()], abs=0.06)
    bars = re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", two[1])
    expected = [8 + 150 * (1 - end) for y in PROBES["noisy"].values() for end in wilson(y, 16)]
    assert [float(end) for bar in bars for end in bar] == pytest.approx(expected, abs=0.06)
    assert "noisy 100.0 % 80.6\N{EN DASH}100.0 87.5 %" in words and "times 51/255 = 0.2" in words


def test_without_a_probe_the_report_says_how_to_get_one(evaluation: FakeEvaluation) -> None:
    found = evaluation.values()
    for one in found["defenses"].values():
        one["radius_curve"] = []
    words = section(evaluation.html(found), "radius")
    assert "checks.thorough: true" in words and "<svg" not in words


def test_accuracy_over_passes_is_drawn_for_sets_with_a_usable_gradient(
    evaluation: FakeEvaluation,
) -> None:
    found = section(evaluation.html(), "compute")
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", found)
    # The full rung of `rounded` is void.
    assert titles == ["none: images still right", "student_grey: images still right"]
    drawn, *_ = re.findall(r'<polyline points="(.*?) "/>', found)
    points = [tuple(float(number) for number in point.split(",")) for point in drawn.split(" ")]
    assert points[0] == pytest.approx((44, 8 + 150 / 12), abs=0.06)
    assert points[-1] == pytest.approx((44 + 364, 8 + 150 * 4 / 12), abs=0.06)
    assert sorted(points) == points and sorted(y for _, y in points) == [y for _, y in points]
    words = Page(found).text
    assert "full gradient, pgd 66.7 %" in words
    assert "Missing on purpose: noisy." in words


def test_published_figures_are_shown_beside_measured_ones(evaluation: FakeEvaluation) -> None:
    assert "#published" not in evaluation.html()
    found = evaluation.values()
    figures = {"clean": 0.987, "classifier/pgd": 0.95, "full/cw": 0.5}
    found["published"] = {"student_grey": {"source": "A <Paper>, Table 2", "accuracy": figures}}
    del found["defenses"]["student_grey"]["attacks"]["full/cw"]
    words = Page(section(evaluation.html(found), "published")).text
    assert "student_grey A <Paper>, Table 2 clean 98.7 % 100.0 % 75.8\N{EN DASH}100.0 +1.3" in words
    assert "grey box, pgd 95.0 % 91.7 % 64.6\N{EN DASH}98.5 -3.3" in words
    assert "full gradient, cw 50.0 % not counted" in words
    assert "robust accuracy (worst of all attacks) not printed 0.0 % 0.0\N{EN DASH}24.2" in words


def test_the_worst_class_is_bold(evaluation: FakeEvaluation) -> None:
    classes = evaluation.metrics.defenses["student_adaptive"].per_class
    # Of twelve images the seven first are right under the worst attack.
    for index, name in enumerate(CLASSES):
        mine = (evaluation.test.labels == index).numpy()
        if not mine.any():
            assert name not in classes
            continue
        one = classes[name]
        assert one.n == mine.sum() and one.accuracy == mine[:7].sum() / mine.sum()
        assert (one.low, one.high) == wilson(one.accuracy, one.n)
    found = evaluation.values()
    accuracies = {"0": 0.5, "1": 0.25}
    found["defenses"]["student_adaptive"]["per_class"] = {
        name: {"accuracy": one, "low": 0, "high": 1, "n": 4} for name, one in accuracies.items()
    }
    shown = section(evaluation.html(found), "classes")
    (row,) = re.findall(r'<th scope="row">student_adaptive<.*?</tr>', shown, re.DOTALL)
    assert re.findall(r"<strong>(.*?)</strong>", row) == ["25.0 %"]
    # Where all are alike none is the worst.
    (row,) = re.findall(r'<th scope="row">none<.*?</tr>', shown, re.DOTALL)
    assert "<strong>" not in row and "0.0 %" in row


def test_of_many_classes_only_the_worst_are_listed(
    evaluation: FakeEvaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = evaluation.values()
    for one in found["defenses"].values():
        score = {"low": 0.5, "high": 1.0, "n": 9}
        one["per_class"] = {f"c{i}": {"accuracy": 1 - i / 100, **score} for i in range(60)}
    monkeypatch.setattr(report, "WIDE", 2)
    shown = section(evaluation.html(found), "classes")
    assert "worst of 60: c59 41.0 %" in Page(shown).text
    assert "c55" in shown and "c54" not in shown


def test_names_that_users_choose_are_escaped(evaluation: FakeEvaluation, page: Page) -> None:
    assert EVIL not in evaluation.html() and "<b>2</b>" not in evaluation.html()
    assert EVIL in page.text
    assert "zero gradient <i>" in page.text


def test_the_report_shows_pictures_curves_and_models(
    evaluation: FakeEvaluation, page: Page
) -> None:
    assert page.text.count("true: ") >= 3
    assert "adversarial" in page.text and "|difference|" in page.text
    assert evaluation.html().count("data:image/png") == sum(len(sets) for sets in RIGHT.values())
    assert "val_accuracy 87.5" in page.text and "loss 0.125" in page.text
    mark = fingerprint(evaluation.models / "teacher")[:12]
    assert f"teacher 0: teacher {mark}" in page.text and "gone: no longer there" in page.text
    assert "forgotten" not in page.text


def picked(html: str, name: str) -> list[str]:
    """Return the labels of the picker `name`, the one shown first marked by a star."""
    inputs = rf'<input type="radio" name="{name}" id="(.*?)"( checked)?><label for="(.*?)">(.*?)<'
    found = re.findall(inputs, html)
    assert all(one == other for one, _, other, _ in found)
    return [label + "*" * bool(chosen) for _, chosen, _, label in found]


def test_the_table_says_whether_a_measurement_is_valid_and_which_warnings_there_are(
    evaluation: FakeEvaluation,
) -> None:
    words = Page(section(evaluation.html(), "scores")).text
    assert "measurement valid" in words and "robust accuracy" in words and " ok " not in words
    assert "no: 3 failed" in words
    assert "2 warnings: gradient_present/full, quantisation" in words
    assert "attacks written for this defense: soft" in words
    assert "student_grey : broken: does not beat none, the classifier without a defense" in words


def test_every_defense_and_every_set_can_be_picked(evaluation: FakeEvaluation) -> None:
    html = evaluation.html()
    names = [name.replace("<", "&lt;").replace(">", "&gt;") for name in RIGHT]
    assert picked(html, "defense") == [n + "*" * (n == "student_adaptive") for n in names]
    sets = ["grey box, pgd", "BPDA, pgd", "full gradient, pgd*", "full gradient, cw"]
    assert picked(html, "attack-2") == sets
    assert picked(html, "attack-5") == [
        "BPDA, pgd", "BPDA, square", "soft stand-in, pgd*", "full gradient, pgd",
    ]  # fmt: skip
    assert "full gradient, pgd: carries 12 of the 12 images." in Page(html).text
    assert html.count("the rung is void: no usable gradient") == 2


def test_the_table_of_attacks_shows_accuracy_and_agreement(evaluation: FakeEvaluation) -> None:
    """Of 12 images bpda/pgd leaves 4 right, on 3 of which the bare classifier was right, too."""
    table = evaluation.html().split('<section id="attacks">')[1].split("</section>")[0]
    rows = table.split("<span>rounded</span>")[1].split("</tbody>")[0].split("<tr>")
    (bpda,) = (row for row in rows if "BPDA, pgd<" in row)
    assert re.findall(r"<td>([\d.]+)\s%</td>", bpda)[:2] == ["33.3", "25.0"]
    assert re.findall(r"<td>([\d.]+)\s%</td>", rows[-1])[:2] == ["100.0", "91.7"]


def test_a_set_that_was_not_counted_is_named(evaluation: FakeEvaluation) -> None:
    found = evaluation.values()
    del found["defenses"]["student_grey"]["attacks"]["full/cw"]
    html = evaluation.html(found)
    assert "full gradient, cw not counted" in Page(html).text


def test_the_report_says_when_there_are_no_pictures(evaluation: FakeEvaluation) -> None:
    html = evaluation.html(results=[replace(result, panels={}) for result in evaluation.results])
    assert "Nothing to show" in html and "data:image" not in html


def test_every_check_has_a_meaning() -> None:
    files = [
        *Path("components/probes").glob("*.py"),
        *Path("components/checks").glob("*.py"),
        *Path("pipelines/tasks").glob("*.py"),
    ]
    source = "".join(file.read_text() for file in files)
    named = set(re.findall(r'name=f?"(\w+)[/"]', source)) | {"unbounded", "unbounded_by_gradient"}
    assert named == set(MEANINGS)


def test_settings_start_with_the_kind() -> None:
    value = {"steps": 3, "kind": "pgd", "on": True, "inner": {"kind": "a", "b": 1}}
    assert settings(value) == "pgd, steps 3, on yes, inner (a, b 1)"
