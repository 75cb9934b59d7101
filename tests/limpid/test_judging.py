"""`limpid.evaluate`: a verdict on networks that a caller holds, by the code of the stages."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import limpid
from components.attacks import Linf
from components.attacks.sets import read_crafted
from components.data import image_set
from components.data.draws import NoiseStream, fresh
from components.models.accuracy import predict
from components.models.checkpoints import read_card
from components.models.defense import Defense
from components.models.foreign import adopt_classifier, adopt_purifier
from limpid import judging
from limpid.inputs import as_images, as_threat
from limpid.judging import BARE, DEFENSE, PURIFIER, Verdict, judge
from limpid.ladders import choose
from pipelines.config.schema import load
from pipelines.errors import ConfigError
from pipelines.tasks import metrics

N, EPS = 48, 51 / 255
SHORT = {"kind": "pgd", "steps": 5, "step": 0.25, "restarts": 1, "random_start": True,
         "early_stop": True, "eot": 1}  # fmt: skip
LADDER = {"classifier": {"pgd": SHORT}, "bpda": {"pgd": SHORT}, "full": {"pgd": SHORT}}


class Patterns(nn.Module):
    """A linear classifier: the nearest of three patterns."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.rand(3, 64, generator=generator) - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.weight.T


class Smooth(nn.Module):
    """A purifier that takes the mean of a pixel and its neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def data(count: int = N, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return images that the classifier gets right, at 8 bits, with room for an attack."""
    images = torch.rand(4 * count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    images = (255 * images).round() / 255
    logits = Patterns()(images).detach()
    return images[:count], logits[:count].argmax(1)


def judged(tmp_path: Path | None = None, **changes: Any) -> Verdict:
    settings = {"threat": "linf:2/255", "ladder": LADDER, "purifier": Smooth(), **changes}
    return limpid.evaluate(Patterns(), *data(), out=tmp_path, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation without validation images and an unseen classifier."""
    return tmp_path_factory.mktemp("judged")


@pytest.fixture(scope="module")
def without(folder: Path) -> Verdict:
    return judged(folder)


def test_a_purifier_is_judged_beside_its_classifier(without: Verdict, folder: Path) -> None:
    found = without
    assert set(found.metrics.defenses) == {BARE, DEFENSE} and found.name == DEFENSE
    assert set(found.scored.rungs) == {"classifier", "bpda", "full"}
    assert found.interval[0] <= found.robust_accuracy <= found.interval[1]
    assert found.scored.clean.n == N
    assert metrics.read(folder / "metrics.json") == found.metrics
    assert (folder / "report.html").stat().st_size and (folder / "scores.parquet").exists()


def test_a_classifier_alone_has_one_row() -> None:
    found = judged(purifier=None)
    assert set(found.metrics.defenses) == {BARE} and found.name == BARE


def test_robust_accuracy_of_a_linear_model_is_its_closed_form() -> None:
    """An image falls where some margin is below eps times the L1 length, inside [0,1] or not."""
    images = 0.25 + 0.5 * data()[0]
    images = (255 * images).round() / 255
    network = Patterns()
    with torch.no_grad():
        logits, weight = network(images), network.weight
    labels, eps = logits.argmax(1), 6 / 255
    gaps = logits.gather(1, labels[:, None]) - logits
    reach = eps * (weight[labels][:, None] - weight[None]).abs().sum(2)
    others = torch.ones_like(gaps).scatter_(1, labels[:, None], 0).bool()
    standing = (gaps > reach)[others].view(len(images), 2).all(1)
    apgd = {"steps": 100, "restarts": 1, "eot": 1}
    ladder = {"full": {kind: {"kind": kind, **apgd} for kind in ("apgd_ce", "apgd_margin")}}
    found = limpid.evaluate(network, images, labels, threat="linf:6/255", ladder=ladder)
    assert 0.1 < float(standing.float().mean()) < 0.9
    assert found.robust_accuracy == pytest.approx(float(standing.float().mean()), abs=1.01 / N)


def test_checks_without_their_images_are_not_asked_and_make_no_candidate(without: Verdict) -> None:
    assert {"remembered", "leakage", "unseen_classifier"} <= set(without.not_asked)
    assert not without.candidate and without.scored.unseen_classifier is None
    more = judged(validation=data(80, seed=2), unseen=Patterns())
    assert "leakage" not in more.not_asked and more.scored.unseen_classifier is not None


def test_a_validation_image_among_the_test_images_blocks() -> None:
    found = judged(validation=data())
    assert "leakage" in found.failed and found.upper_bound


def test_a_quick_ladder_is_an_upper_bound_without_a_failed_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = judged(tmp_path, ladder="quick")
    assert found.upper_bound and not found.candidate and found.scored.quick
    assert not {"strong_attack", "full_rung", "without_gradients"} & set(found.failed)
    assert "<=" in capsys.readouterr().out
    assert "upper bound" in (tmp_path / "report.html").read_text()


def test_a_second_call_crafts_nothing_again(
    without: Verdict, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = {path: path.stat().st_mtime_ns for path in (folder / ".limpid").rglob("*.parquet")}
    assert written
    assert judged(folder).metrics == without.metrics
    assert written == {path: path.stat().st_mtime_ns for path in written}


def test_other_images_in_the_same_folder_leave_nothing_of_the_first(tmp_path: Path) -> None:
    ladder = {"full": {"pgd": SHORT}}
    images, labels = data(64, seed=3)
    for count in (64, 40):
        some = images[:count], labels[:count]
        found = limpid.evaluate(
            Patterns(), *some, threat="linf:2/255", ladder=ladder, batch=20, out=tmp_path
        )
        assert found.scored.headline.n == count


def test_a_call_that_is_interrupted_leaves_no_verdict_on_other_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = ("metrics.json", "scores.parquet", "report.html")
    judged(tmp_path, purifier=None)
    assert all((tmp_path / name).exists() for name in ends)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(judging, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judged(tmp_path)
    assert (tmp_path / "models" / PURIFIER).exists()
    assert not any((tmp_path / name).exists() for name in ends)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files; name a new folder"):
        judged(tmp_path)
    assert (tmp_path / "models" / "mine.txt").read_text() == "mine"


def test_the_caller_keeps_what_was_given() -> None:
    network, purifier = Patterns().train(), Smooth().train()
    state, before = torch.random.get_rng_state(), network.weight.clone()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    limpid.evaluate(network, *data(), purifier=purifier, threat="linf:2/255", ladder=LADDER)
    assert network.training and purifier.training and network.weight.requires_grad
    assert torch.equal(network.weight, before)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def test_the_folder_says_which_weights_were_scored(without: Verdict, folder: Path) -> None:
    card = read_card(folder / "models" / BARE)
    assert card.model["kind"] == "given" and card.provenance == {}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"threat": "linf:8"}, "threat is 'linf:8'; write linf:8/255"),
        ({"threat": "l1:1"}, "threat is 'l1:1'; write linf:8/255"),
        ({"ladder": "strong"}, "ladder is 'strong'; it may be 'standard' or 'quick'"),
        ({"ladder": {"top": ["pgd"]}}, "the ladder has a rung 'top'; there are classifier"),
        ({"ladder": {"full": ["pgdd"]}}, "the ladder names full/pgdd; give its settings"),
        ({"ladder": {"full": {"mine": {"kind": "pgd"}}}}, "the ladder's full/mine is not valid"),
        ({"ladder": {"bpda": ["pgd"]}}, "the ladder needs an attack on the rung full"),
        ({"ladder": {"bpda": {"pgd": SHORT}, "full": ["pgd"]}},
         "the ladder's attack pgd has other settings on the rung full than on bpda; give each"),
    ],
)  # fmt: skip
def test_a_setting_that_is_none_gets_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace("(", r"\(")) as caught:
        judged(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        (255 * data()[0], data()[1], r"pixels lie in \[0, 255\]; give them in \[0,1\]"),
        (data()[0][0], data()[1], "images have shape"),
        (data()[0], data()[1][:3], "there are 48 images, and labels are torch.int64 of shape"),
        (data()[0][:20], data()[1][:20], "there are 20 images; it takes 32 or more"),
        (data()[0], data()[1] - 5, "a label is -5; classes are numbered from 0"),
        (data()[0].numpy(), data()[1], "images and labels are ndarray and Tensor; give tensors"),
    ],
)
def test_images_that_are_none_get_one_sentence(images: Any, labels: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        limpid.evaluate(Patterns(), images, labels)


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (data()[0][:40], "the set mine is torch.float32 of shape .*40, 1, 8, 8.*give float32"),
        ((255 * data()[0]).byte(), "the set mine is torch.uint8 of shape"),
        (data()[0] + 1.5, "48 images of the set mine have pixels outside of .0,1."),
        (torch.full_like(data()[0], torch.nan), "48 images of the set mine have pixels outside"),
        (
            1 - data()[0],
            "images of the set mine leave the ball, up to .*; linf 2/255 allows 0.0078",
        ),
    ],
)
def test_adversarial_images_that_are_none_get_one_sentence(images: Tensor, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        judged(given={"mine": images})


@pytest.mark.parametrize("name", limpid.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(limpid, name) is not None


def test_a_threat_is_read_exactly() -> None:
    assert as_threat("linf:8/255") == Linf(norm="linf", eps_255=8.0)
    assert as_threat("l2:0.5").eps == 0.5


def test_images_keep_their_8_bits() -> None:
    images, labels = data()
    assert torch.equal(as_images(images, labels).pixels(), images)


def test_the_demo_is_judged_as_by_the_stages(reproduced: Path, tmp_path: Path) -> None:
    """Equal flags, image by image, and an equal headline: it is the code of the stages."""
    from components.models.checkpoints import load as load_network

    line = reproduced
    params, test = load(line / "params.yaml"), image_set.read(line / "data" / "test")
    attacks = {n: one.model_dump(mode="json") for n, one in params.attacks.items()}
    ladder = params.defenses["student_grey"].ladder
    rungs = {mode: {n: attacks[n] for n in ladder[mode]} for mode in ("bpda", "full")}
    networks = {
        BARE: load_network(line / "models" / "standard"),
        PURIFIER: load_network(line / "models" / "student_grey"),
    }
    found = judge(
        networks, test, None, params.threat, rungs, params.batch, params.seed, None, tmp_path
    )
    stored = json.loads((line / "reports" / "metrics.json").read_text())["defenses"]["student_grey"]
    for mode, some in rungs.items():
        assert found.scored.rungs[mode].accuracy == stored["rungs"][mode]["accuracy"]
        for name in some:
            ours = read_crafted(tmp_path / "adversarial" / DEFENSE / mode / name)
            theirs = read_crafted(line / "adversarial" / "student_grey" / mode / name)
            assert torch.equal(ours.success, theirs.success)


class Noise(nn.Module):
    """A purifier that draws from torch's global stream."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 0.02 * torch.randn_like(x)).clamp(0, 1)


def test_a_random_purifier_comes_through_without_a_false_block() -> None:
    margin = {"kind": "apgd_margin", "steps": 20, "restarts": 1, "eot": 2}
    ladder = {"full": {"pgd": SHORT | {"eot": 2}, "margin": margin}}
    first, again = (judged(purifier=Noise(), ladder=ladder) for _ in range(2))
    assert first.scored.stochastic and "one_answer" in first.not_asked
    assert not set(first.failed) - {"strong_attack"}
    assert first.metrics == again.metrics


class Shaken(nn.Module):
    """A classifier behind Gaussian noise from torch's global stream, as in randomised smoothing."""

    def __init__(self, sigma: float = 0.05, logits: float = 0.0) -> None:
        super().__init__()
        self.inner, self.sigma, self.logits = Patterns(), sigma, logits

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x + self.sigma * torch.randn_like(x))
        return logits + self.logits * torch.randn_like(logits)


class Keyed(Shaken):
    """The same, from keyed noise."""

    stochastic = True

    def forward(self, x: Tensor, stream: NoiseStream | None = None) -> Tensor:
        stream = fresh(len(x), x.device) if stream is None else stream
        noise = stream.normal(tuple(x.shape[1:]), "noise").to(x.dtype)
        logits: Tensor = self.inner(x + self.sigma * noise)
        return logits


@pytest.fixture(scope="module")
def shaken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Verdict, Path]:
    """The quick evaluation of a random classifier, behind a deterministic purifier."""
    folder, state = tmp_path_factory.mktemp("shaken"), torch.random.get_rng_state()
    found = limpid.evaluate(
        Shaken(), *data(), purifier=Smooth(), threat="linf:2/255", ladder="quick", unseen=Shaken(),
        out=folder,
    )  # fmt: skip
    assert torch.equal(torch.random.get_rng_state(), state)
    return found, folder


def test_a_random_classifier_comes_through_without_a_false_block(
    shaken: tuple[Verdict, Path],
) -> None:
    rows = shaken[0].metrics.defenses
    assert set(rows) == {BARE, DEFENSE}
    for row in rows.values():
        assert row.stochastic and row.checks.blocking_failed == []
        assert [one.asked for one in row.checks.findings if one.name == "one_answer"] == [False]
        assert 0 < row.headline.accuracy <= row.clean.accuracy < 1
    assert rows[DEFENSE].unseen_classifier is not None
    accuracies = [one.accuracy for one in rows[DEFENSE].attacks.values()]
    assert any(accuracy * N != int(accuracy * N) for accuracy in accuracies), "one draw alone"


def test_sets_of_a_random_classifier_are_replayed_under_its_own_names(
    shaken: tuple[Verdict, Path],
) -> None:
    """One set an attack, since none stops early, crafted with EOT on the random classifier."""
    found, folder = shaken
    rows = found.metrics.defenses
    assert set(rows[BARE].attacks) == {"full/pgd_quick", "full/margin_quick"}
    assert set(rows[DEFENSE].attacks) == {
        "classifier/pgd_quick", "classifier/margin_quick", "full/pgd_quick", "full/margin_quick",
    }  # fmt: skip
    replayed = read_crafted(folder / "adversarial" / BARE / "full" / "pgd_quick")
    assert int(replayed.backward.min()) == 20 * 4
    efforts = [one for one in rows[DEFENSE].checks.findings if one.check == "effort"]
    assert {one.name for one in efforts} == {f"effort/{name}" for name in rows[DEFENSE].attacks}
    assert all(one.passed and f"{N} images of a random defense" in one.detail for one in efforts)


def test_noise_of_a_classifier_repeats_from_call_to_call(
    shaken: tuple[Verdict, Path], tmp_path: Path
) -> None:
    again = limpid.evaluate(
        Shaken(), *data(), purifier=Smooth(), threat="linf:2/255", ladder="quick", unseen=Shaken()
    )
    assert again.metrics == shaken[0].metrics


def test_keyed_noise_of_a_classifier_is_asked_in_every_batch() -> None:
    settings = {"threat": "linf:2/255", "ladder": "quick"}
    state = torch.random.get_rng_state()
    found, parts = (
        limpid.evaluate(Keyed(), *data(), batch=batch, **settings)  # type: ignore[arg-type]
        for batch in (N, 20)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found.failed == [] and "one_answer" not in found.not_asked
    assert found.scored.clean == parts.scored.clean
    # Agreement is with the first answer to the clean image, under the noise of the row itself.
    images = data()[0]
    alone = Defense(adopt_classifier(Keyed(), images, 3), None).freeze()
    said = predict(alone, images, torch.arange(N), 0, "clean", 32, N)
    assert found.scored.clean.agreement == pytest.approx((said == said[0]).mean())


def test_robust_accuracy_of_a_random_linear_classifier_is_its_closed_form() -> None:
    """Two logits with noise of their own: right with the probability of a Gaussian margin."""
    images = (255 * (0.25 + 0.5 * data(200)[0])).round() / 255
    network = nn.Sequential(Shaken(0.0, logits=0.5), Two())
    with torch.no_grad():
        logits, weight = Two()(Patterns()(images)), Patterns().weight.detach()
    labels = logits.argmax(1)
    margins = (logits[:, 0] - logits[:, 1]).abs() - 4 / 255 * (weight[0] - weight[1]).abs().sum()
    exact = float(torch.special.ndtr(margins / (0.5 * 2**0.5)).mean())
    ladder = {"full": {"pgd": SHORT | {"eot": 4, "step": 1.0}}}
    found = limpid.evaluate(network, images, labels, threat="linf:4/255", ladder=ladder)
    (attack,) = found.scored.attacks.values()
    assert attack.accuracy == pytest.approx(exact, abs=4 * 0.5 / (200 * 32) ** 0.5)
    assert 0.3 < exact < found.scored.clean.accuracy - 0.02


class Two(nn.Module):
    """The first two of three logits."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits[:, :2]


@pytest.mark.parametrize("purifier", [None, Smooth(), Noise()], ids=["none", "smooth", "random"])
@pytest.mark.parametrize(
    ("network", "names"),
    [(Patterns(), ["pgd", "autoattack"]), (Keyed(), ["pgd_eot", "autoattack_rand"])],
    ids=["deterministic", "random"],
)
def test_both_rows_meet_the_attacks_for_what_they_are(
    purifier: nn.Module | None, network: nn.Module, names: list[str]
) -> None:
    images = data()[0]
    before = adopt_purifier(purifier, images) if purifier else None
    defense = Defense(adopt_classifier(network, images, 3), before)
    through = ["pgd_eot", "autoattack_rand"] if defense.stochastic else ["pgd", "autoattack"]
    found = choose("standard", defense, 3, as_threat("linf:2/255"))
    assert found.defended == {"classifier": names, "bpda": through[:1], "full": through}
    more = ["pgd_eot"] if through != names else []
    assert found.bare == {"full": names + more}


@pytest.mark.parametrize(
    ("ladder", "sentence"),
    [
        ({"full": ["autoattack"]}, "the ladder names autoattack on the rung full: .*not.*rand"),
        ({"full": ["pgd_eot"], "classifier": ["a3"]},
         "the ladder names a3 on the rung classifier: a3 is not for stochastic defenses"),
    ],
)  # fmt: skip
def test_an_attack_that_is_not_for_a_random_classifier_gets_one_sentence(
    ladder: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        limpid.evaluate(Keyed(), *data(), threat="linf:2/255", ladder=ladder)
    assert "\n" not in str(caught.value)


def test_a_ladder_without_an_attack_for_the_classifier_alone_says_so() -> None:
    sentence = "has autoattack_rand on the rung full, .* for the classifier alone, too"
    ladder = {"full": ["autoattack_rand"]}
    with pytest.raises(ConfigError, match=sentence) as caught:
        judged(purifier=Noise(), ladder=ladder)
    assert "\n" not in str(caught.value)
    images = data()[0]
    defense = Defense(adopt_classifier(Patterns(), images, 3), adopt_purifier(Noise(), images))
    found = choose({**ladder, "classifier": ["pgd"]}, defense, 3, as_threat("linf:2/255"))
    assert found.bare == {"full": ["pgd"]}
