"""`limpid attack`: the verdict of `evaluate`, its exit codes, one sentence for each fault."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import limpid
from components.data import image_set
from components.data.image_set import ImageSet
from components.data.shards import DataError
from limpid import comparing, ladders
from limpid.__main__ import main
from pipelines.tasks import metrics
from pipelines.tasks.metrics import Metrics, rung_of

N, EPS, FIRST_ID = 48, 3 / 255, 100
MINE = """
import torch
from torch import nn

from components.models.defense import Defense
from components.models.purifiers.controls import Identity


class Patterns(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 64))

    def forward(self, x):
        return (x - 0.5).flatten(1) @ self.weight.T


class Smooth(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) + 0 * self.bias


def bare():
    return Patterns()


def pair():
    return Patterns(), Smooth()


def defense():
    return Defense(Patterns(), Identity(kind="identity").build((1, 8, 8)))


def raises():
    raise RuntimeError("no such weights\\nanywhere")


def leaves():
    raise SystemExit(3)


def triple():
    return Patterns(), Patterns(), Patterns()


def text():
    return "a network"


def argument(width):
    return Patterns()


number = 3
"""
STRONG = """
full:
  ce: {kind: apgd_ce, steps: 100, restarts: 1, eot: 1}
  margin: {kind: apgd_margin, steps: 100, restarts: 1, eot: 1}
"""
WEAK = """
full:
  pgd:
    {kind: pgd, steps: 1, step: 0.01, restarts: 1, random_start: false, early_stop: true, eot: 1}
"""


def weight() -> Tensor:
    return torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) - 0.5


def data(count: int = N) -> ImageSet:
    """Return images at 8 bits that the classifier gets right, with room for the attack."""
    generator = torch.Generator().manual_seed(1)
    images = (255 * (0.25 + 0.5 * torch.rand(count, 1, 8, 8, generator=generator))).round()
    labels = ((images / 255 - 0.5).flatten(1) @ weight().T).argmax(1)
    return ImageSet(images.byte(), labels, FIRST_ID + torch.arange(count), ("a", "b", "c"))


def worst_images(test: ImageSet) -> Tensor:
    """Return the worst images of the ball for the linear classifier: its closed form."""
    x, w = test.pixels(), weight()
    candidates = [
        x + EPS * (w[k] - w[test.labels]).sign().view(-1, 1, 8, 8) for k in range(3)
    ]  # fmt: skip
    gaps = [
        ((c - 0.5).flatten(1) @ w.T)[:, k] - ((c - 0.5).flatten(1) * w[test.labels]).sum(1)
        for k, c in enumerate(candidates)
    ]
    best = torch.stack(gaps).masked_fill(torch.arange(3)[:, None] == test.labels, -1e9).argmax(0)
    return torch.stack(candidates)[best, torch.arange(len(test))]


def standing(test: ImageSet) -> float:
    """Return the fraction of images that no example of the ball fools."""
    logits = (worst_images(test) - 0.5).flatten(1) @ weight().T
    return float((logits.argmax(1) == test.labels).double().mean())


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with networks, weights and data, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("mine.py").write_text(MINE)
    Path("strong.yaml").write_text(STRONG)
    Path("weak.yaml").write_text(WEAK)
    save_file({"weight": weight()}, "w.safetensors")
    image_set.write(Path("data/test"), data(), 20)
    yield tmp_path
    for name in ("mine", "broken"):
        sys.modules.pop(name, None)


def attack(*words: str, factory: str = "mine:bare", ladder: str = "strong.yaml") -> int:
    chosen = [] if "--quick" in words else ["--ladder", ladder]
    given = [] if "--data" in words else ["--data", "data"]
    weights = [] if "--weights" in words else ["--weights", "w.safetensors"]
    threat = [] if "--threat" in words else ["--threat", "linf:3/255"]
    return main(["attack", factory, *given, *threat, *weights, *chosen, *words])


def read(folder: str = "out") -> Metrics:
    return metrics.read(Path(folder) / "metrics.json")


def write_rung(images: Tensor, name: str = "mine.parquet", ids: Any = None) -> str:
    """Write adversarial images as float32 bytes; return the word for the command line."""
    columns: dict[str, Any] = {"image": [one.numpy().tobytes() for one in images]}
    if ids is not None:
        columns["id"] = np.asarray(ids)
    pq.write_table(pa.table(columns), name)
    return f"mine={name}"


# What it says, and how it ends


def test_the_verdict_on_a_linear_classifier_is_its_closed_form_and_that_of_evaluate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert attack("--out", "out", "--fail-under", "0.1", "--junit", "ci/junit.xml") == 0
    found, test = read().defenses["classifier"], data()
    assert 0.2 < standing(test) < 0.9
    assert found.headline.accuracy == pytest.approx(standing(test), abs=1e-9)
    assert not found.headline.upper_bound
    printed = capsys.readouterr().out
    assert f"robust accuracy {100 * standing(test):.1f} %" in printed
    assert "is not under --fail-under 0.1\n" in printed

    class Patterns(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 0.5).flatten(1) @ weight().T

    apgd = {"steps": 100, "restarts": 1, "eot": 1}
    ladder = {"full": {n: {"kind": f"apgd_{n}", **apgd} for n in ("ce", "margin")}}
    same = limpid.evaluate(
        Patterns(), test.pixels(), test.labels, threat="linf:3/255", ladder=ladder
    )
    assert same.robust_accuracy == found.headline.accuracy
    assert not same.failed


def test_a_bound_that_is_missed_and_a_check_that_blocks_end_with_5(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reached = str(standing(data()))
    assert attack("--fail-under", reached, "--junit", "junit.xml") == 5
    said = capsys.readouterr().err
    assert said.startswith("error: the lower bound of robust accuracy, ") and said.count("\n") == 1
    assert f"is under --fail-under {float(reached):g}" in said
    cases = {one.get("name"): one for one in ElementTree.parse("junit.xml").getroot()}
    assert cases["fail_under"].find("failure") is not None
    assert cases["strong_attack"].find("failure") is None
    assert cases["leakage"].find("skipped") is not None

    assert attack("--junit", "junit.xml", ladder="weak.yaml") == 5
    said = capsys.readouterr().err
    assert "blocking checks failed, so the score is an upper bound: classifier: " in said
    assert "strong_attack" in said and "fail_under" not in said
    suite = ElementTree.parse("junit.xml").getroot()
    cases = {one.get("name"): one for one in suite}
    failure = cases["strong_attack"].find("failure")
    assert failure is not None and "missing: " in str(failure.get("message"))
    assert int(suite.get("failures", 0)) >= 1 and int(suite.get("tests", 0)) == len(suite)


def test_a_quick_ladder_cannot_prove_that_it_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert attack("--quick", "--fail-under", "0.01") == 0
    printed = capsys.readouterr().out
    assert "robust accuracy at most " in printed
    assert "can fail here and never proves anything" in printed
    assert attack("--quick", "--fail-under", "0.99") == 5


@pytest.mark.parametrize("factory", ["mine:pair", "mine:defense", "mine.py:pair", "mine:Patterns"])
def test_a_factory_may_return_a_pair_a_defense_or_a_classifier(factory: str) -> None:
    attack("--out", "out", factory=factory, ladder="weak.yaml")
    rows = {"classifier"} if factory == "mine:Patterns" else {"classifier", "defense"}
    assert set(read().defenses) == rows
    assert read().defenses["classifier"].clean.accuracy == 1


def test_every_network_has_weights_of_its_own() -> None:
    save_file({"bias": torch.ones(1)}, "p.safetensors")
    torch.save({"weight": torch.zeros(3, 64)}, "u.pt")
    words = ("--weights", "w.safetensors", "--weights", "purifier=p.safetensors")
    more = ("--unseen", "mine:bare", "--weights", "unseen=u.pt")
    attack("--out", "out", *words, *more, factory="mine:pair", ladder="weak.yaml")
    unseen = read().defenses["defense"].unseen_classifier
    # All logits of the unseen one are equal, so it answers the first class.
    assert unseen is not None
    assert unseen.clean.accuracy == pytest.approx(float((data().labels == 0).float().mean()))


def test_some_images_are_drawn_in_proportion_and_by_the_seed() -> None:
    drawn = []
    for seed in ("0", "0", "1"):
        attack("--n", "36", "--seed", seed, "--out", f"out{seed}", ladder="weak.yaml")
        drawn.append(image_set.read(Path(f"out{seed}/data/test")))
    whole, some = (np.bincount(one.labels.numpy()) for one in (data(), drawn[0]))
    assert len(drawn[0]) == 36 and np.abs(some - 0.75 * whole).max() < 1
    assert torch.equal(drawn[0].ids, drawn[1].ids) and not torch.equal(drawn[0].ids, drawn[2].ids)


def test_validation_images_are_asked_only_where_they_are_given() -> None:
    attack("--out", "out", ladder="weak.yaml")
    asked = {f.name: f.asked for f in read().defenses["classifier"].checks.findings}
    assert not asked["leakage"]
    image_set.write(Path("data/val"), data(80)[torch.arange(N, 80)], 20)
    attack("--out", "out", "--validation", "data", ladder="weak.yaml")
    checks = read().defenses["classifier"].checks
    assert {f.name: f.asked for f in checks.findings}["leakage"]
    assert "leakage" not in checks.blocking_failed


def images_of(root: str, *classes: str) -> None:
    """Write 16 images into a folder for each class."""
    for number, name in enumerate(classes):
        (Path(root) / name).mkdir(parents=True)
        for index in range(16):
            pixels = np.full((8, 8), 16 * number + index, np.uint8)
            Image.fromarray(pixels).save(f"{root}/{name}/{index}.png")


@pytest.mark.parametrize(
    ("validation", "sentence"),
    [
        (("cat", "dog", "eel"), ""),
        (("ant", "cat", "dog"), "label 0 is ant in mine/val and cat in the test images"),
        (("cat", "dog"), "label 2 is no class in mine/val and eel in the test images"),
        (("0", "1", "2"), ""),
        (("0", "2"), "label 0 is 0 in mine/val and cat in the test images"),
    ],
)
def test_validation_images_have_the_classes_of_the_test_images(
    validation: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images_of("mine/test", "cat", "dog", "eel")
    images_of("mine/val", *validation)
    words = ("--data", "mine/test", "--validation", "mine/val")
    assert attack(*words, ladder="weak.yaml") == (2 if sentence else 5)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and sentence in said


# One's own adversarial images


@pytest.mark.parametrize("ids", [True, False])
def test_images_of_ones_own_count_and_no_effort_is_asked_of_them(ids: bool) -> None:
    """The worst images there are leave what the closed form says, whatever the ladder finds."""
    test = data()
    images = worst_images(test)
    order = torch.arange(N).flip(0) if ids else torch.arange(N)
    word = write_rung(images[order], ids=test.ids[order] if ids else None)
    assert attack("--out", "out", "--rung", word, ladder="weak.yaml") == 5
    found = read().defenses["classifier"]
    assert found.headline.accuracy == pytest.approx(standing(test), abs=1e-9)
    assert found.rungs["full"].accuracy > found.rungs["given"].accuracy
    assert found.carried_by["given/mine"] > 0
    about = {f.check: f for f in found.checks.findings if f.about == "given/mine"}
    assert set(about) == {"accounting", "threat_model"} and all(f.passed for f in about.values())
    assert "provenance/probes" not in found.checks.blocking_failed
    # A ladder that leaves so much more is none to rest a claim on.
    assert "full_is_strongest/given" in found.checks.blocking_failed
    assert "given images, mine" in Path("out/report.html").read_text()


def test_images_of_ones_own_beside_a_strong_ladder_change_nothing_that_passed() -> None:
    word = write_rung(data().pixels())
    assert attack("--out", "out", "--rung", word, factory="mine:pair") in (0, 5)
    one = read()
    attack("--out", "out", factory="mine:pair")
    for name, found in read().defenses.items():
        assert one.defenses[name].headline == found.headline
        assert one.defenses[name].checks.blocking_failed == found.checks.blocking_failed
    assert {rung_of(n) for n in one.defenses["defense"].attacks} == {"full", "given"}


def test_images_that_a_quick_ladder_misses_do_not_block(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ladders.ATTACKS, "a3", {**ladders.PGD, "steps": 1, "step": 0.01})
    word = write_rung(worst_images(data()))
    attack("--quick", "--out", "out", "--rung", word)
    found = read().defenses["classifier"]
    # So weak an attack is caught by the probe that attacks again, and by nothing else.
    assert found.checks.blocking_failed == ["stored_attacks"]
    (asked,) = [f for f in found.checks.findings if f.name == "full_is_strongest/given"]
    assert not asked.asked and "a quick ladder gives an upper bound (p = " in asked.detail
    assert found.headline.upper_bound
    assert "robust accuracy at most " in capsys.readouterr().out


def test_images_of_ones_own_are_those_of_the_drawn_test_images() -> None:
    word = write_rung(worst_images(data()))
    attack("--n", "32", "--out", "out", "--rung", word, ladder="weak.yaml")
    drawn = image_set.read(Path("out/data/test"))
    headline = read().defenses["classifier"].headline
    assert headline.accuracy == pytest.approx(standing(drawn), abs=1e-9)


# A verdict from before


def test_a_baseline_fails_only_what_is_significantly_lower(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert attack("--out", "before") == 0
    assert attack("--baseline", "before/metrics.json", "--junit", "junit.xml") == 0
    assert "+0.0 points" in capsys.readouterr().out
    save_file({"weight": weight().flip(0)}, "weak.safetensors")
    words = ("--weights", "weak.safetensors", "--junit", "junit.xml")
    assert attack("--baseline", "before", *words) == 5
    said = capsys.readouterr().err
    assert "that it is lower" in said and said.count("\n") == 1
    cases = {one.get("name"): one for one in ElementTree.parse("junit.xml").getroot()}
    assert cases["baseline"].find("failure") is not None


def test_a_set_called_like_the_headline_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    """An attack and a set of images may be called `robust`, and are not taken for the headline."""
    word = write_rung(data().pixels()).replace("mine=", "robust=")
    Path("robust.yaml").write_text(STRONG.replace("ce:", "robust:"))
    assert attack("--out", "before", "--rung", word, ladder="robust.yaml") == 0
    assert attack("--baseline", "before") == 0
    assert "+0.0 points" in capsys.readouterr().out


def test_a_baseline_of_the_same_folder_is_read_before_it_is_replaced(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert attack("--out", "out") == 0
    save_file({"weight": weight().flip(0)}, "weak.safetensors")
    words = ("--weights", "weak.safetensors", "--out", "out", "--baseline", "out/metrics.json")
    assert attack(*words) == 5
    assert "that it is lower" in capsys.readouterr().err


def test_a_quick_number_beside_a_baseline_is_said_to_be_an_upper_bound(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sentence = "the {} is an upper bound, so the true one may"
    assert attack("--out", "before") == 0
    assert attack("--quick", "--baseline", "before", "--out", "quick") == 0
    printed = capsys.readouterr().out
    assert sentence.format("new number") in printed and sentence.format("baseline") not in printed
    assert attack("--baseline", "quick") == 0
    printed = capsys.readouterr().out
    assert sentence.format("baseline") in printed and sentence.format("new number") not in printed


def test_the_verdict_is_said_before_a_comparison_that_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attack("--out", "before") == 0
    capsys.readouterr()

    def fails(*_: object) -> None:
        raise DataError("not of one evaluation")

    monkeypatch.setattr(comparing, "compared", fails)
    assert attack("--baseline", "before", "--fail-under", "0.1", "--junit", "junit.xml") == 3
    assert "robust accuracy" in capsys.readouterr().out
    names = {one.get("name") for one in ElementTree.parse("junit.xml").getroot()}
    assert {"strong_attack", "fail_under"} <= names


# One sentence, whatever is wrong


def _raw_pickle() -> None:
    torch.save(nn.Linear(2, 2), "whole.pt")


def _others() -> None:
    image_set.write(Path("other/test"), data(64), 20)


def _flat() -> None:
    Path("flat").mkdir()
    for index in range(3):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(f"flat/{index}.png")


def _five() -> None:
    test = data()
    test.labels[0] = 4
    image_set.write(Path("five"), ImageSet(test.images, test.labels, test.ids, tuple("abcde")), 20)


def _outside() -> None:
    write_rung(data().pixels() + 0.1)


def _strangers() -> None:
    write_rung(data().pixels(), ids=torch.arange(N))


def _few() -> None:
    write_rung(data().pixels()[:40])


def _broken() -> None:
    Path("broken.py").write_text("import nothing_of_that_name\n")


def _before() -> None:
    _others()
    main(["attack", "mine:bare", "--data", "other", "--ladder", "weak.yaml", "--out", "before"])


def _own_files() -> None:
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")


def _file() -> None:
    Path("file").write_text("a file in place of the folder")


def _wide() -> None:
    images = ImageSet(
        torch.zeros(40, 1, 8, 9).byte(), torch.arange(40) % 3, torch.arange(40), ("a", "b", "c")
    )
    image_set.write(Path("wide"), images, 20)


def _too_few() -> None:
    image_set.write(Path("few"), data(20), 20)


def _wrong_shape() -> None:
    save_file({"weight": torch.zeros(10, 64)}, "ten.safetensors")


def _wrong_names() -> None:
    save_file({"module.weight": torch.zeros(3, 64)}, "two.safetensors")


FAULTS: list[tuple[dict[str, Any], tuple[str, ...], Any, int, str]] = [
    ({"factory": "mine"}, (), None, 2, "the factory is 'mine'; write module:function"),
    ({"factory": "mime:bare"}, (), None, 2, "there is no module mime here or among what is"),
    ({"factory": "mime.py:bare"}, (), None, 2, "mime.py is not there; write module:function"),
    ({"factory": "mine:bar"}, (), None, 2, "mine has no function bar, did you mean bare?"),
    ({"factory": "mine:number"}, (), None, 2, "mine has a number that is no function"),
    ({"factory": "broken:bare"}, (), _broken, 2, "broken cannot be imported: it raised ModuleNot"),
    ({"factory": "mine:raises"}, (), None, 2, "mine:raises raised RuntimeError: no such weights ("),
    ({"factory": "mine:leaves"}, (), None, 2, "mine:leaves raised SystemExit: 3 ("),
    ({"factory": "mine:argument"}, (), None, 2, "mine:argument raised TypeError: argument() miss"),
    ({"factory": "mine:text"}, (), None, 2, "mine:text returned str; it must return a classifier"),
    ({"factory": "mine:triple"}, (), None, 2, "mine:triple returned tuple of Patterns, Patterns"),
    ({}, ("--unseen", "mine:pair"), None, 2, "mine:pair returned tuple of Patterns, Smooth; it mu"),
    ({}, ("--weights", "ten.safetensors"), _wrong_shape, 2,
     "ten.safetensors does not fit the network: size mismatch for weight"),
    ({}, ("--weights", "two.safetensors"), _wrong_names, 2,
     "two.safetensors lacks weight, which the network has; the names must be those of its state"),
    ({}, ("--weights", "purifier=w.safetensors"), None, 2, "there is no purifier to load it into"),
    ({}, ("--weights", "whole.pt"), _raw_pickle, 2, "whole.pt holds pickled objects"),
    ({}, ("--weights", "no.pt"), None, 2, "no.pt is not there; name a file of weights"),
    ({}, ("--data", "nowhere"), None, 3, "nowhere is not there; name a folder of labelled images"),
    ({}, ("--data", "flat"), _flat, 3, "so no image has a label"),
    ({}, ("--data", "five"), _five, 2, "the labels need 5 classes, so at least as many columns"),
    ({}, ("--threat", "linf:8"), None, 2, "threat is 'linf:8'; write linf:8/255 or l2:0.5"),
    ({}, ("--n", "1000"), None, 2, "--n is 1000; it may be 32 to 48, all that there are"),
    ({}, ("--n", "3"), None, 2, "--n is 3; it may be 32 to 48"),
    ({}, ("--batch", "0"), None, 2, "--batch is 0; it is 1 or more"),
    ({}, ("--rung", "mine=mine.parquet"), _outside, 2, "48 of 48 images of the set mine leave the"),
    ({}, ("--rung", "mine=mine.parquet"), _strangers, 2, "48 of its ids are none of the test imag"),
    ({}, ("--rung", "mine=mine.parquet"), _few, 2, "has 40 images and no column id, and there are"),
    ({}, ("--rung", "mine.parquet"), None, 2, "--rung mine.parquet has no name and file"),
    ({}, ("--rung", "a/b=mine.parquet"), _outside, 2, "a set is called 'a/b'; letters, digits"),
    ({}, ("--fail-under", "45"), None, 2, "--fail-under is 45; robust accuracy lies in [0,1]"),
    ({}, ("--fail-under", "nan"), None, 2, "--fail-under is nan; robust accuracy lies in [0,1]"),
    ({}, ("--baseline", "before"), None, 2, "before is not there; name a folder with a verdict"),
    ({}, ("--baseline", "before"), _before, 2, "two threats cannot be compared"),
    ({}, ("--baseline", "before", "--threat", "linf:8/255"), _before, 2, "other test images (ids"),
    ({}, ("--out", "full"), _own_files, 2, "holds other files; name a new folder"),
    ({}, ("--out", "file/out"), _file, 4, "NotADirectoryError: "),
    ({}, ("--junit", "file/junit.xml"), _file, 4, "Error: "),
    ({}, ("--validation", "wide"), _wide, 2, "wide are (1, 8, 9), and the test images (1, 8, 8)"),
    ({}, ("--data", "few"), _too_few, 2, "there are 20 test images; it takes 32 or more"),
    ({"ladder": "no.yaml"}, (), None, 2, "no.yaml is not there; name a YAML file of rungs"),
    ({}, ("--validation", "nowhere"), None, 3, "nowhere is not there; name a folder of labelled"),
]  # fmt: skip


@pytest.mark.parametrize(("how", "words", "prepare", "code", "sentence"), FAULTS)
def test_what_is_wrong_gets_one_sentence(
    how: dict[str, Any], words: tuple[str, ...], prepare: Any, code: int, sentence: str,
    capsys: pytest.CaptureFixture[str], here: Path,
) -> None:  # fmt: skip
    if prepare:
        prepare()
        capsys.readouterr()
    assert attack(*words, **how) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1
    assert "Traceback" not in said and not (here / ".limpid/last_error.txt").exists()


def test_a_gpu_that_is_not_there_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attack("--device", "cuda") == 2
    assert "--device is cuda, and torch sees no GPU here" in capsys.readouterr().err


def test_a_cluster_that_is_named_is_not_used_and_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attack(ladder="weak.yaml")
    assert "not on the cluster" not in capsys.readouterr().out
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    attack(ladder="weak.yaml")
    assert "this runs here, and not on the cluster that RAY_API_SERVER_ADDRESS" in (
        capsys.readouterr().out
    )
