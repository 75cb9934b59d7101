"""The search keeps the best image of a row, its copies included; under noise, not the luckiest."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from toy_networks import Function, Noisy
from toys import LINF, THREATS, head, parse_attack

from components.attacks import L2, Linf
from components.attacks import search as search_module
from components.attacks.search import Search, strongest
from components.data.draws import Draws, NoiseStream
from components.data.image_set import ImageSet
from components.models.defense import Defense, Target, bind


def test_the_stronger_image_beats_the_luckier_one(test_set: ImageSet) -> None:
    """The luckiest of 60 queries of a weak image has a lower margin than a stronger image has."""
    data = head(test_set, 60)
    weak, strong = data.pixels(), (data.pixels() + 0.02).clamp(0, 1)

    class Lottery(Noisy):
        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            assert stream is not None
            marked = (x - weak).flatten(1).amax(1) > 0.01
            luck = 2 * stream.normal((1,), "luck")[:, 0]
            return (1.0 - 1.5 * marked + luck)[:, None, None, None].expand_as(x)

    class FirstLogit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.pad(x.flatten(1).mean(1, keepdim=True), (0, 9))

    for eot in (1, 4):
        draws = Draws(0, "attack", torch.arange(60))
        target = bind(Defense(FirstLogit(), Lottery()).freeze(), "full", draws, eot)
        search = Search(target, weak, torch.zeros(60, dtype=torch.int64), LINF, True)
        for _ in range(60):
            search.query(weak)
        search.query(strong)
        lucky = (search.best == weak).flatten(1).all(1)
        assert lucky.float().mean() > 0.6, "luck made no difference"
        found = search.outcome()
        kept = (found.images == strong).flatten(1).all(1)
        assert kept.float().mean() > 0.8
        # The reported margin is a mean of fresh draws, not the lowest margin of the search.
        assert found.margin[kept].mean() == pytest.approx(-0.5, abs=0.4)


def test_the_strongest_image_is_classified_correctly_under_the_fewest_draws() -> None:
    """By hand: three candidates for each of four rows, under four draws."""
    table = torch.tensor([
        # Correct once of four, whatever its mean; twice; three times.
        [[9.0, -1, -1, -1], [1, 1, -9, -9], [1, 1, 1, -9]],
        # Equally often correct: the lower mean decides.
        [[2.0, 2, -1, -1], [1, 1, -1, -1], [3, 3, -1, -1]],
        # NaN and infinite margins give no NaN.
        [[torch.inf, torch.nan, -torch.inf, 1], [1, 1, 1, 1], [torch.inf] * 4],
        # As in the second row, of margins that are small beside a count of draws.
        [[2e-12, 2e-12, -1e-12, -1e-12], [1e-12, 1e-12, -1e-12, -1e-12], [3e-12] * 4],
    ])  # fmt: skip
    labels = torch.zeros(4, dtype=torch.int64)

    class Scripted:
        def __call__(self, x: Tensor, draw: int) -> Tensor:
            seen = table[torch.arange(4), x.flatten().long(), draw]
            return functional.pad(seen[:, None], (0, 1))

    candidates = torch.arange(3.0)[:, None, None, None, None].expand(3, 4, 1, 1, 1)
    best, margins = strongest(cast(Target, Scripted()), candidates, labels, range(4))
    assert best.flatten().tolist() == [0, 1, 0, 1]
    assert margins.tolist() == [1.5, 0.0, -torch.inf, 0.0]


@THREATS
@pytest.mark.parametrize("name", ["pgd", "apgd_ce", "apgd_t", "fab_t"])
def test_an_accelerator_drops_fooled_images_late_and_finds_the_same(
    name: str, threat: Linf | L2, test_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it asks about a fooled image until then is for nothing, and not kept.

    In float64, so that the rounding of batches of any size is nothing. Of the copies of an image,
    several may be fooled by then.
    """
    data = head(test_set, 40)
    generator = torch.Generator().manual_seed(3)
    first, last = (
        torch.randn(*sides, generator=generator).double()
        for sides in ((data.pixels()[0].numel(), 16), (16, 5))
    )
    defense = Defense(Function(lambda x: (x.flatten(1) @ first / 8).tanh() @ last), None).freeze()
    images, draws = data.pixels().double(), Draws(0, "attack", data.ids)
    labels = defense(images).argmax(1)
    small, found, asked = threat.scaled(0.2), [], []
    for every in (1, 8):
        monkeypatch.setattr(search_module, "_drops_every", lambda device, every=every: every)
        target = bind(defense, "full", draws, 1)
        found.append(parse_attack(name).run(target, images, labels, small, draws))
        asked.append(int(target.passes.forward.sum()))
    fell = found[0].margin <= 0
    assert 3 < fell.sum() < 37, "all alike: nothing is seen"
    assert torch.equal(found[1].margin <= 0, fell)
    same = ~fell if name.endswith("_t") else torch.ones_like(fell)
    assert torch.allclose(found[1].images[same], found[0].images[same], rtol=0, atol=1e-9)
    assert asked[1] > asked[0]


def test_copies_are_of_the_active_rows_and_end_with_the_first_that_is_fooled() -> None:
    """Five images; copies of rows 3 and 1; the second copy of row 3 fools the model."""

    class Brightness(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.pad(0.75 - x.flatten(1).mean(1, keepdim=True), (0, 1))

    images = torch.full((5, 1, 2, 2), 0.5)
    draws = Draws(0, "attack", torch.arange(5))
    target = bind(Defense(Brightness(), None).freeze(), "full", draws, 1)
    search = Search(target, images, torch.zeros(5, dtype=torch.int64), LINF, True)
    search.select(torch.tensor([3, 1]))
    for runs, of, index in search.copies(3):
        assert of.tolist() == [3, 3, 3, 1, 1, 1] and index.tolist() == [0, 1, 2, 0, 1, 2]
        pixels = torch.tensor([0.6, 0.8, 0.7, 0.55, 0.6, 0.7])[:, None, None, None]
        found = runs.evaluate(pixels.expand(6, 1, 2, 2), lambda logits, labels: logits[:, 0])
        (kept,) = runs.drop_fooled(found.margin)
        assert kept.tolist() == pytest.approx([0.2, 0.15, 0.05])
        assert runs.rows.tolist() == [3, 4, 5]
    assert search.rows.tolist() == [3, 1]
    assert search.margin.tolist() == pytest.approx([0.25, 0.05, 0.25, -0.05, 0.25])
    # All copies of a row are counted, and rows that were not selected are left alone.
    assert search.outcome().iterations.tolist() == [0, 3, 0, 3, 0]
    search.restart()
    assert search.rows.tolist() == [0, 1, 2, 4]
