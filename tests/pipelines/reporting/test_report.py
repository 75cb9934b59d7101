"""The report, the score table and the verdict say what the metrics say, and nothing rosier."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.attacks import Crafted, Linf
from components.attacks.distance.cw import CwL2
from components.attacks.gradient import Pgd
from components.attacks.ladder import MODES
from components.attacks.sets import read_crafted, seal, write_crafted
from components.config import Config
from components.data import image_set
from components.data.image_set import ImageSet
from components.data.shards import shard_name, write_json
from components.evaluation.counting import Effort, Score
from components.evaluation.detection import CURVE, Watched
from components.models.checkpoints import ModelCard, build, fingerprint, save
from components.models.classifiers import SmallCnn
from components.models.defense import STAND_INS
from components.models.purifiers.apudae import Apudae
from components.models.purifiers.autoencoder import ConvAutoencoder
from components.models.purifiers.controls import BitDepth, GaussianNoise
from components.probes import Finding
from components.probes.statistics import wilson
from pipelines.commands import scores
from pipelines.config.sections import Scoring
from pipelines.reporting import report
from pipelines.reporting.networks import trained
from pipelines.reporting.report import write_report
from pipelines.reporting.wording import BLIND, MEANINGS, describe_subject, settings
from pipelines.stages import verdict
from pipelines.tasks import scoring
from pipelines.tasks.panels import look
from pipelines.tasks.scoring import Entry, Plan, Result, summary
from pipelines.tasks.subject import Subject

N, SHAPE, CLASSES = 12, (1, 8, 8), ("0", "1", "<b>2</b>")
EVIL = "<script>alert(1)</script>"
THREAT = Linf(norm="linf", eps_255=51.0)
PGD = Pgd(
    kind="pgd", steps=10, step=0.2, restarts=1, random_start=True, early_stop=True, eot=1
)  # fmt: skip
APUDAE = Apudae(
    kind="apudae", steps=15, rate=0.05, optimiser="adam", target="minimum", scaled=False,
    noise_255=0.0, transform=None,
)  # fmt: skip
CW = CwL2(kind="cw_l2", c=1.0, searches=1, steps=2, learning_rate=0.1, confidence=0.0, eot=1)
# How many of the images are right, by mode/attack, for every scored defense.
RIGHT = {
    "none": {"full/pgd": 0},
    "student_grey": {"classifier/pgd": 11, "bpda/pgd": 12, "full/pgd": 0, "full/cw": 3},
    "student_adaptive": {"classifier/pgd": 8, "bpda/pgd": 8, "full/pgd": 7},
    "noisy": {"classifier/pgd": 12, "full/pgd": 1},
    "rounded": {"bpda/pgd": 4, "soft/pgd": 3, "full/pgd": 12},
    EVIL: {"full/pgd": 12},
}
# Four images fall after 1, 10, 10 and 100 passes, eight stand after 200.
EFFORT = Effort(np.array([1, 10, 10, 100] + [200] * 8), np.arange(N) < 4)
# Accuracies right at multiples of the radius, of the entries that were probed.
PROBES = {
    "none": {"0": 1.0, "0.25": 0.5, "1": 0.0, "4": 0.0},
    "noisy": {"0": 1.0, "0.25": 0.875, "1": 0.25, "4": 0.0},
}
ROLES = {"none": "baseline", "noisy": "control", "rounded": "control", EVIL: "control"}


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


class World:
    """A finished pipeline in small: models of random weights, sets, made-up counts."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.models, self.root = root / "models", root
        blocks = ConvAutoencoder(
            kind="conv_autoencoder", blocks=2, width=2, strided=[], residual="global"
        )
        self._model("standard", SmallCnn(kind="small_cnn", width=2), {})
        made_from = {"classifier": fingerprint(self.models / "standard")}
        self._model("unseen", SmallCnn(kind="small_cnn", width=2), {})
        self._model("forgotten", SmallCnn(kind="small_cnn", width=1), {})
        self._model("teacher", blocks, made_from)
        made_from |= {"teacher 0": fingerprint(self.models / "teacher"), "gone": "f" * 64}
        for name in ("student_grey", "student_adaptive"):
            self._model(name, blocks, made_from)
        standard = Subject(self.models / "standard")
        images = torch.randint(256, (N, *SHAPE), dtype=torch.uint8)
        with torch.no_grad():
            labels = standard.defense()(images / 255).argmax(1)
        self.test = ImageSet(images, labels, torch.arange(N), CLASSES)
        image_set.write(root / "test", self.test, 5)
        self.plan = Plan(
            threat=THREAT,
            attacks={"pgd": PGD, "cw": CW},
            scoring=Scoring(select_draws=32, score_draws=32, shown=3),
            seed=0,
            batch=5,
            val=root / "test",
            test=root / "test",
            unseen=self.models / "unseen",
            surrogate=None,
        )
        self.entries = [self._entry(name) for name in RIGHT]
        self.results = [self._result(entry) for entry in self.entries]
        self.metrics = {
            "selftest": {"cases": 34, "caught": 34},
            "threat_model": {
                **THREAT.model_dump(), "n": N, "select_draws": 32, "score_draws": 32
            },
            "published": {},
            "defenses": {
                entry.name: summary(entry, result, self.plan, self.test)
                for entry, result in zip(self.entries, self.results, strict=True)
            },
        }  # fmt: skip

    def html(
        self, metrics: Mapping[str, Any] | None = None, results: Sequence[Result] | None = None
    ) -> str:
        """The report, of these metrics and results instead of its own where they are given."""
        out = self.root / "report.html"
        metrics, results = metrics or self.metrics, results or self.results
        models = list(trained(self.models, self.entries, self.plan))
        write_report(out, metrics, self.entries, results, self.plan, models)
        return out.read_text()

    def _model(self, name: str, model: Config, made_from: Mapping[str, str]) -> None:
        card = ModelCard(
            format=1,
            family="classifier" if isinstance(model, SmallCnn) else "purifier",
            model=model.model_dump(mode="json"),
            shape=list(SHAPE),
            class_names=list(CLASSES),
            provenance={
                "objective": {"kind": "classification"},
                "training": {"epochs": 2},
                "seed": 0,
                "made_from": dict(made_from),
            },
        )
        save(self.models / name, build(card).eval(), card)
        history = [{"loss": 2.0, "val_accuracy": 0.25}, {"loss": 0.125, "val_accuracy": 0.875}]
        write_json(self.models / name / "history.json", history)

    def _entry(self, name: str) -> Entry:
        standard = self.models / "standard"
        subject = Subject(standard)
        if name.startswith("student"):
            subject = Subject(standard, self.models / name)
        elif name == "noisy":
            subject = Subject(standard, control=GaussianNoise(kind="gaussian_noise", sigma=0.1))
        elif name == "rounded":
            subject = Subject(standard, control=BitDepth(kind="bit_depth", bits=1))
        folder = self.root / "adversarial" / str(list(RIGHT).index(name))
        for attack in RIGHT[name]:
            self._set(folder / attack)
        sets = {attack: folder / attack for attack in RIGHT[name]}
        return Entry(name, ROLES.get(name, "defense"), subject, folder / "checks.json", sets)

    def _set(self, folder: Path) -> None:
        clean = self.test.pixels()
        moved = THREAT.project(clean + 0.2 * torch.randn_like(clean), clean)
        ones = torch.ones(N, dtype=torch.int64)
        crafted = Crafted(self.test.ids, self.test.labels, moved, ones.bool(), ones, ones, ones)
        write_crafted(folder / shard_name(0), crafted)
        seal(folder, SHAPE, {})

    def _result(self, entry: Entry) -> Result:
        draws = 32 if entry.name == "noisy" else 1

        def score(right: int) -> Score:
            counts = np.where(np.arange(N) < right, draws, 0)
            return Score(draws, counts, counts)

        right = RIGHT[entry.name]
        inside = {
            name: np.full(N, name != "full/cw" or entry.name == "none")
            for name in ("clean", *right)
        }
        findings = [
            Finding(name=f"accounting/{name}", level="block", passed=True, detail="all there")
            for name in right
        ]
        if entry.name in PROBES:
            figures = {**PROBES[entry.name], "n": 16.0}
            radius = {"name": "radius_pays", "level": "block", "passed": True, "detail": "falls"}
            findings.append(Finding(**radius, figures=figures))
        if entry.name == EVIL:
            detail = "100.0% of 12 images have a zero gradient <i>"
            lie = Finding(name="gradient_present/full", level="block", passed=False, detail=detail)
            findings.append(lie)
        if entry.name == "rounded":
            void = {"name": "gradient_present/full", "level": "warn", "passed": False}
            findings.append(Finding(**void, detail="100.0% of 12 images have a zero gradient"))
        distance = {name: np.full(N, 1.25) for name in right}
        scored = {"clean": score(N), **{name: score(count) for name, count in right.items()}}
        watched = _watched(entry.name, list(right))
        first = self.test[torch.arange(3)]
        sets = {name: read_crafted(folder).images[:3] for name, folder in entry.sets.items()}
        panels = look(entry.subject.defense(), first, sets, 0, 5)
        unseen = (score(N), score(9))
        efforts = {"full/pgd": EFFORT} if entry.name in ("none", "rounded", "student_grey") else {}
        return Result(
            scored, inside, distance, findings, unseen, score(6), watched, panels, efforts
        )


def _watched(name: str, sets: list[str]) -> Watched | None:
    """Suspicions by image: student_adaptive is a good detector, and noisy knows nothing."""
    clean = np.arange(N) / 16
    lifted = {"student_adaptive": 0.5, "noisy": 0.0}
    if name not in lifted:
        return None
    seen = dict.fromkeys(sets, clean + lifted[name])
    control = dict.fromkeys(sets, clean + 0.25)
    validation = np.append(np.arange(18) / 32, [0.65, 0.7])
    all_ = {"clean": clean, **seen}
    return Watched(all_, all_, {"clean": clean, **control}, validation)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def page(world: World) -> Page:
    return Page(world.html())


def test_the_report_needs_nothing_outside_itself(world: World, page: Page) -> None:
    html = world.html()
    assert "http:" not in html and "https:" not in html and "@import" not in html
    assert page.links and all(link.startswith("#") for link in page.links)
    assert all(
        url.startswith("data:image/png;base64,") for url in re.findall(r"url\((.*?)\)", html)
    )
    assert not {"script", "link", "iframe", "img"} & page.tags.keys()
    assert not page.open


def test_equal_inputs_give_equal_bytes(world: World) -> None:
    assert world.html() == world.html()


def test_it_says_what_was_measured(page: Page) -> None:
    assert all(name in page.text for name in RIGHT)
    assert "51/255 = 0.2" in page.text and f"n = {N} test images" in page.text
    best = "Best defense without a failed blocking check: student_adaptive , 58.3 %"
    assert best in page.text
    assert "32.0\N{EN DASH}80.7, n = 12" in page.text


def test_the_illusion_is_said_in_words(world: World, page: Page) -> None:
    said = (
        "student_grey shows 91.7 % when the attacker ignores the purifier, 100.0 % when the "
        "attacker takes the purifier for the identity in the backward pass (BPDA), and 0.0 % when "
        "the attacker differentiates through it: the first two numbers are no robustness."
    )
    assert said in page.text
    alone = (
        "noisy shows 100.0 % when the attacker ignores the purifier, and 8.3 % when the attacker"
    )
    assert alone in page.text and "the first number is no robustness." in page.text
    assert "student_adaptive shows" not in page.text
    assert set(MODES) - {"full", "fixed_noise", *STAND_INS} == set(BLIND)


def test_an_upper_bound_is_struck(world: World) -> None:
    html = world.html()
    (struck,) = re.findall(r'<s class="n">(.*?)</s>.*upper bound, check failed', html)
    assert struck == "100.0 %"
    assert "void: no usable gradient" in html


def test_a_rung_is_void_by_a_warning_too(world: World, page: Page) -> None:
    html = world.html()
    assert "gradient_present/full" in world.metrics["defenses"]["rounded"]["checks"]["warnings"]
    (row,) = re.findall(r'<th scope="row">rounded<small>.*?</tr>', html, re.DOTALL)
    assert "<s>100.0 %</s>" in row and "void: no usable gradient" in row
    assert '<strong class="n">25.0 %</strong>' in row and "upper bound" not in row
    assert "warning gradient_present/full" in page.text


def test_the_lowest_rung_that_is_not_void_is_bold(world: World) -> None:
    def bold(name: str) -> list[str]:
        pattern = rf'<th scope="row">{name}<small>.*?</tr>'
        row, *_ = re.findall(pattern, section(world.html(), "scores"), re.DOTALL)
        return re.findall(r'<strong><span class="n">(.*?)</span>', row)

    assert bold("student_grey") == ["0.0 %"] and bold("student_adaptive") == ["58.3 %"]
    # Not its void full rung, which says nothing.
    assert bold("rounded") == ["25.0 %"]


def test_stand_ins_stand_in_the_tables_where_they_were_run(world: World, page: Page) -> None:
    assert "soft stand\N{NON-BREAKING HYPHEN}in gradient as if rounding were soft" in page.text
    assert "soft stand-in, pgd 25.0 %" in page.text
    assert "A stand-in is what the attacker differentiates" in page.text
    assert not any(f"{mode} stand" in page.text for mode in set(STAND_INS) - {"soft"})
    row, *_ = re.findall(r'<th scope="row">student_adaptive<.*?</tr>', world.html(), re.DOTALL)
    assert row.count("has none") == 1 and "rounded shows" not in page.text


def test_a_column_has_words_for_every_rung(world: World) -> None:
    found = json.loads(json.dumps(world.metrics))
    rungs = found["defenses"]["rounded"]["rungs"]
    rungs |= dict.fromkeys(MODES, rungs["full"])
    html = world.html(found)
    words = Page(html).text
    assert all(f"{kind} stand\N{NON-BREAKING HYPHEN}in gradient" in words for kind in STAND_INS)


def test_how_a_network_is_used_is_said() -> None:
    subject = Subject(Path("models/standard"), Path("models/denoiser"), inference=APUDAE)
    assert describe_subject(subject) == (
        "purifier denoiser used as apudae, steps 15, rate 0.05, optimiser adam, target minimum, "
        "scaled no, noise_255 0.0, transform none"
    )
    assert describe_subject(Subject(Path("models/standard"))) == "bare classifier standard"


def section(html: str, name: str) -> str:
    (found,) = re.findall(rf'<section id="{name}">.*?</section>', html, re.DOTALL)
    return str(found)


def test_detection_is_said_as_measured(world: World) -> None:
    html = world.html()
    words = Page(section(html, "detection")).text
    assert '<a href="#detection">' in html
    assert "another claim than robust accuracy" in words
    assert "student_adaptive thresholds on 20 images" in words
    found = world.metrics["defenses"]["student_adaptive"]["detection"]
    row = re.search(r"full gradient, pgd (\S+) (\S+) (\S+) % (\S+) %", words)
    assert row and row.groups() == ("0.944", "0.778", "66.7", "75.0")
    # Of twelve, the five last are wrong under the worst attack; the eight last are rejected.
    counted = [found["clean_rejected"][r] for r in ("1", "5")]
    counted += [found["detect_or_correct"][r] for r in ("1", "5")]
    shares = [f"{100 * score['accuracy']:.1f} %" for score in counted]
    assert shares == ["0.0 %", "8.3 %", "100.0 %", "100.0 %"]
    spans = [f"{100 * one['low']:.1f}\N{EN DASH}{100 * one['high']:.1f}" for one in counted]
    cells = " ".join(f"{share} {span}" for share, span in zip(shares, spans, strict=True))
    assert cells in words


def test_the_tradeoff_is_drawn_from_the_curve(world: World) -> None:
    shown, after = section(world.html(), "detection").split("ROC curves on test images")
    drawn = re.findall(r'<polyline points="(.*?) "/>', shown)
    curve = world.metrics["defenses"]["noisy"]["detection"]["curve"]
    # Half of the clean images and more are rejected, so that the axis ends at all of them.
    assert curve[-1][0] > 0.5 and "100 % of clean images rejected" in shown
    points = [(46 + 246 * x, 110 - 104 * y) for x, y in curve]
    assert len(drawn) == 2 and len(points) == len(CURVE)
    for point, (x, y) in zip(drawn[1].split(" "), points, strict=True):
        assert [float(value) for value in point.split(",")] == pytest.approx([x, y], abs=0.06)
    assert shown.count("<circle") == 4 and shown.count('<circle class="hollow"') == 2
    # Then every set of both as a ROC curve.
    attacks = [
        world.metrics["defenses"][n]["detection"]["attacks"] for n in ("student_adaptive", "noisy")
    ]
    lines = re.findall(r'<polyline points="(.*?) "/>', after)
    sets = [seen for each in attacks for seen in each.values()]
    assert len(lines) == len(sets)
    for line, seen in zip(lines, sets, strict=True):
        points = [(44 + 364 * false, 8 + 150 * (1 - true)) for false, true in seen["roc"]]
        for point, (x, y) in zip(line.split(" "), points, strict=True):
            assert [float(value) for value in point.split(",")] == pytest.approx([x, y], abs=0.06)
        assert f"AUC {seen['auc']:.3f}" in after


def test_a_detector_no_better_than_one_that_knows_nothing_is_named(page: Page) -> None:
    assert "from clean ones as well as, or better than, noisy on 2 of 2 sets." in page.text
    assert "student_adaptive on" not in page.text


def test_a_void_rung_says_nothing_of_a_detector(world: World) -> None:
    found = json.loads(json.dumps(world.metrics))
    found["defenses"]["noisy"]["checks"]["warnings"].append("gradient_present/full")
    html = world.html(found)
    shown = section(html, "detection")
    assert "noisy on 1 of 1 sets" in shown and "<s>0.500</s>" in shown


def test_detect_or_correct_is_an_upper_bound_where_the_headline_is(world: World) -> None:
    found = json.loads(json.dumps(world.metrics))
    found["defenses"]["student_adaptive"]["headline"]["upper_bound"] = True
    html = world.html(found)
    assert section(html, "detection").count('<s class="n">100.0 %</s>') == 2


def test_without_a_detector_there_is_no_section(world: World) -> None:
    found = json.loads(json.dumps(world.metrics))
    for one in found["defenses"].values():
        one["detection"] = None
    html = world.html(found)
    assert "#detection" not in html and "Detect" not in Page(html).text


def test_the_probe_over_the_radius_is_drawn_with_its_intervals(world: World) -> None:
    found = section(world.html(), "radius")
    words = Page(found).text
    assert "not its headline" in words and "on the first 16 test images" in words
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


def test_without_a_probe_the_report_says_how_to_get_one(world: World) -> None:
    found = json.loads(json.dumps(world.metrics))
    for one in found["defenses"].values():
        checks_ = one["checks"]
        checks_["findings"] = [f for f in checks_["findings"] if f["name"] != "radius_pays"]
    words = section(world.html(found), "radius")
    assert "checks.thorough: true" in words and "<svg" not in words


def test_what_stands_over_passes_is_drawn_where_it_is_honest(world: World) -> None:
    found = section(world.html(), "compute")
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", found)
    # The full rung of `rounded` is void.
    assert titles == ["none: images still right", "student_grey: images still right"]
    drawn, *_ = re.findall(r'<polyline points="(.*?) "/>', found)
    points = [tuple(float(part) for part in point.split(",")) for point in drawn.split(" ")]
    assert points[0] == pytest.approx((44, 8 + 150 / 12), abs=0.06)
    assert points[-1] == pytest.approx((44 + 364, 8 + 150 * 4 / 12), abs=0.06)
    assert sorted(points) == points and sorted(y for _, y in points) == [y for _, y in points]
    words = Page(found).text
    assert "full gradient, pgd 66.7 %" in words
    assert "Missing on purpose: noisy." in words


def test_published_figures_stand_beside_what_was_measured(world: World) -> None:
    assert "#published" not in world.html()
    found = json.loads(json.dumps(world.metrics))
    figures = {"clean": 0.987, "classifier/pgd": 0.95, "full/cw": 0.5}
    found["published"] = {"student_grey": {"source": "A <Paper>, Table 2", "accuracy": figures}}
    del found["defenses"]["student_grey"]["attacks"]["full/cw"]
    words = Page(section(world.html(found), "published")).text
    assert "student_grey A <Paper>, Table 2 clean 98.7 % 100.0 % 75.8\N{EN DASH}100.0 +1.3" in words
    assert "grey box, pgd 95.0 % 91.7 % 64.6\N{EN DASH}98.5 -3.3" in words
    assert "full gradient, cw 50.0 % not counted" in words
    assert "headline, worst of all not printed 0.0 % 0.0\N{EN DASH}24.2" in words


def test_the_worst_class_stands_out(world: World) -> None:
    classes = world.metrics["defenses"]["student_adaptive"]["per_class"]
    # Of twelve images the seven first are right under the worst attack.
    for index, name in enumerate(CLASSES):
        mine = (world.test.labels == index).numpy()
        if not mine.any():
            assert name not in classes
            continue
        one = classes[name]
        assert one["n"] == mine.sum() and one["accuracy"] == mine[:7].sum() / mine.sum()
        assert (one["low"], one["high"]) == wilson(one["accuracy"], one["n"])
    found = json.loads(json.dumps(world.metrics))
    shares = {"0": 0.5, "1": 0.25}
    found["defenses"]["student_adaptive"]["per_class"] = {
        name: {"accuracy": share, "low": 0, "high": 1, "n": 4} for name, share in shares.items()
    }
    shown = section(world.html(found), "classes")
    (row,) = re.findall(r'<th scope="row">student_adaptive<.*?</tr>', shown, re.DOTALL)
    assert re.findall(r"<strong>(.*?)</strong>", row) == ["25.0 %"]
    # Where all are alike none is the worst.
    (row,) = re.findall(r'<th scope="row">none<.*?</tr>', shown, re.DOTALL)
    assert "<strong>" not in row and "0.0 %" in row


def test_many_classes_are_summed_up_by_the_worst(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = json.loads(json.dumps(world.metrics))
    for one in found["defenses"].values():
        score = {"low": 0.5, "high": 1.0, "n": 9}
        one["per_class"] = {f"c{i}": {"accuracy": 1 - i / 100, **score} for i in range(60)}
    monkeypatch.setattr(report, "WIDE", 2)
    shown = section(world.html(found), "classes")
    assert "worst of 60: c59 41.0 %" in Page(shown).text
    assert "c55" in shown and "c54" not in shown


def test_what_users_name_is_escaped(world: World, page: Page) -> None:
    assert EVIL not in world.html() and "<b>2</b>" not in world.html()
    assert EVIL in page.text
    assert "zero gradient <i>" in page.text


def test_pictures_curves_and_models_are_there(world: World, page: Page) -> None:
    assert page.text.count("true: ") >= 3
    assert "adversarial" in page.text and "|difference|" in page.text
    assert world.html().count("data:image/png") == sum(len(sets) for sets in RIGHT.values())
    assert "val_accuracy 87.5" in page.text and "loss 0.125" in page.text
    mark = fingerprint(world.models / "teacher")[:12]
    assert f"teacher 0: teacher {mark}" in page.text and "gone: no longer there" in page.text
    assert "forgotten" not in page.text


def picked(html: str, name: str) -> list[str]:
    """Return the labels of the picker `name`, the one shown first marked by a star."""
    inputs = rf'<input type="radio" name="{name}" id="(.*?)"( checked)?><label for="(.*?)">(.*?)<'
    found = re.findall(inputs, html)
    assert all(one == other for one, _, other, _ in found)
    return [label + "*" * bool(chosen) for _, chosen, _, label in found]


def test_every_defense_and_every_set_can_be_picked(world: World) -> None:
    html = world.html()
    names = [name.replace("<", "&lt;").replace(">", "&gt;") for name in RIGHT]
    assert picked(html, "defense") == [n + "*" * (n == "student_adaptive") for n in names]
    sets = ["grey box, pgd", "BPDA, pgd", "full gradient, pgd*", "full gradient, cw"]
    assert picked(html, "attack-2") == sets
    assert picked(html, "attack-5") == ["BPDA, pgd*", "soft stand-in, pgd", "full gradient, pgd"]
    assert "full gradient, pgd: carries 12 of the 12 images." in Page(html).text
    assert html.count("the rung is void: no usable gradient") == 2


def test_a_set_that_was_not_counted_is_named(world: World) -> None:
    found = json.loads(json.dumps(world.metrics))
    del found["defenses"]["student_grey"]["attacks"]["full/cw"]
    html = world.html(found)
    assert "full gradient, cw not counted" in Page(html).text


def test_nothing_to_show_is_said(world: World) -> None:
    html = world.html(results=[replace(result, panels={}) for result in world.results])
    assert "Nothing to show" in html and "data:image" not in html


def test_every_check_has_a_meaning() -> None:
    files = [
        *Path("components/probes").glob("*.py"),
        *Path("components/checks").glob("*.py"),
        Path(scoring.__file__),
    ]
    source = "".join(file.read_text() for file in files)
    named = set(re.findall(r'name=f?"(\w+)[/"]', source)) | {"unbounded", "unbounded_by_gradient"}
    assert named == set(MEANINGS)


def test_settings_start_with_the_kind() -> None:
    value = {"steps": 3, "kind": "pgd", "on": True, "inner": {"kind": "a", "b": 1}}
    assert settings(value) == "pgd, steps 3, on yes, inner (a, b 1)"


@pytest.fixture
def metrics(world: World, tmp_path: Path) -> Path:
    path = tmp_path / "metrics.json"
    write_json(path, world.metrics)
    return path


@pytest.mark.parametrize("columns", ["80", "30"])
def test_scores_fit_into_80_columns_and_lose_no_digit(
    columns: str, metrics: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert scores.main(["--metrics", str(metrics)]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    (row,) = (line for line in out.splitlines() if line.startswith("student_adaptive"))
    assert row.split() == ["student_adaptive", "100.0", "66.7", "66.7", "58.3", "58.3",
                           "32.0-80.7", "100/75", "no", "ok"]  # fmt: skip
    assert "<=100.0" in out and "2 bad" in out
    (row,) = (line for line in out.splitlines() if line.startswith("rounded"))
    assert row.split()[1:5] == ["100.0", "-", "33.3", "void"] and row.split()[-1] == "ok"
    words = " ".join(out.split())
    assert "student_grey shows 91.7 % when the attacker ignores the purifier" in words
    assert "reports/report.html" in out
    assert "mlflow server --backend-store-uri sqlite:///mlflow.db --workers 1\n" in out
    assert "http://127.0.0.1:5000" in out


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"defenses": {"a": {}}}'])
@pytest.mark.parametrize(("command", "code"), [(scores.main, 2), (verdict.main, 3)])
def test_missing_or_damaged_metrics_end_in_one_sentence(
    content: bytes | None, command: Any, code: int, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_bytes(content)
    assert command(["--metrics", str(path)]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"error: {path} ")
    assert captured.err.count("\n") == 1


def test_the_verdict_passes_over_controls(
    metrics: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict.main(["--metrics", str(metrics)]) == 0
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("name", ["none", "student_grey"])
def test_the_verdict_says_no_and_names_whom(
    name: str, metrics: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(metrics.read_text())
    found["defenses"][name]["checks"]["blocking_failed"] = ["logits", "provenance/full/pgd"]
    write_json(metrics, found)
    assert verdict.main(["--metrics", str(metrics)]) == 5
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"{name} (logits, provenance/full/pgd)" in error
    assert "student_adaptive" not in error and error.count("\n") == 1
