"""Batches: every image once an epoch, with its own noise, moved where no example belongs to it."""

from collections.abc import Mapping
from itertools import chain

import pytest
import torch
from torch import Tensor, nn
from toys import head
from training_toys import Recorder, Scalar, changed, record

from components.attacks import Linf
from components.attacks.gradient import ascend
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, bind
from components.training.loop import Epoch, fit


@pytest.fixture(scope="module")
def few(train_set: ImageSet) -> ImageSet:
    return head(train_set, 150)


def test_every_epoch_has_every_image_once_in_a_new_order(few: ImageSet) -> None:
    recorder = record(few, epochs=3, batch_size=30)
    epochs = [list(chain.from_iterable(recorder.ids[k : k + 5])) for k in (0, 5, 10)]
    for shown in epochs:
        assert sorted(shown) == sorted(few.ids.tolist())
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert all(len(batch.labels) == 30 for batch in recorder.batches)


def test_the_remainder_of_an_epoch_is_left_out(few: ImageSet) -> None:
    recorder = record(few, epochs=2, batch_size=40)
    assert [len(ids) for ids in recorder.ids] == [40] * 6
    assert len(set(chain.from_iterable(recorder.ids[:3]))) == 120


def test_batches_have_images_with_their_own_labels_and_examples(few: ImageSet) -> None:
    attacked = torch.rand(150, 1, 8, 8)
    recorder = record(few, attacked, epochs=1)
    row_of = {image: row for row, image in enumerate(few.ids.tolist())}
    for batch, ids in zip(recorder.batches, recorder.ids, strict=True):
        rows = torch.tensor([row_of[image] for image in ids])
        assert torch.equal(batch.images, few.pixels()[rows])
        assert torch.equal(batch.labels, few.labels[rows])
        assert batch.attacked is not None and torch.equal(batch.attacked, attacked[rows])
    assert record(few, epochs=1).batches[0].attacked is None


def test_noise_is_new_in_every_epoch_and_keyed_by_image(few: ImageSet) -> None:
    recorder = record(few, epochs=2, batch_size=50)
    noise = [
        {image: tuple(row) for ids, rows in zip(recorder.ids[k : k + 3], recorder.noise[k : k + 3],
         strict=True) for image, row in zip(ids, rows.tolist(), strict=True)}
        for k in (0, 3)
    ]  # fmt: skip
    assert all(noise[0][image] != noise[1][image] for image in noise[0])
    other = record(few, epochs=1, batch_size=75)
    for ids, rows in zip(other.ids, other.noise, strict=True):
        assert all(noise[0][i] == tuple(r) for i, r in zip(ids, rows.tolist(), strict=True))


def test_an_epoch_reports_mean_metrics_and_validation_in_eval_mode(few: ImageSet) -> None:
    modes = []

    def validate(model: nn.Module, epoch: int) -> Mapping[str, float]:
        modes.append((epoch, model.training))
        return {"val": 0.25}

    config = changed(optimiser="sgd", batch_size=50, epochs=2)
    seen: list[Epoch] = []
    for epoch in fit(Scalar(), Recorder(), few, None, config, 0, validate, None):
        seen.append(epoch)
    assert [e.index for e in seen] == [0, 1] and modes == [(0, False), (1, False)]
    assert seen[0].metrics["step"] == pytest.approx(2) and seen[0].metrics["val"] == 0.25
    assert seen[1].metrics["step"] == pytest.approx(5)


# Augmentation


@pytest.mark.parametrize("kind", ["none", "flip", "flip_crop"])
def test_augmentation_flips_and_crops_images(kind: str, few: ImageSet) -> None:
    recorder = record(few, epochs=2, augmentation=kind)
    pixels = dict(zip(few.ids.tolist(), few.pixels(), strict=True))
    moves: set[tuple[bool, int, int]] = set()
    for batch, ids in zip(recorder.batches, recorder.ids, strict=True):
        for image, shown in zip(ids, batch.images, strict=True):
            moves.add(move(pixels[image], shown))
    flips, downs, rights = ({m[k] for m in moves} for k in range(3))
    everywhere = set(range(-4, 5))
    if kind == "none":
        assert moves == {(False, 0, 0)}
    elif kind == "flip":
        assert moves == {(False, 0, 0), (True, 0, 0)}
    else:
        assert flips == {False, True} and downs == everywhere and rights == everywhere


@pytest.mark.parametrize("kind", ["flip", "flip_crop"])
def test_an_example_of_the_pool_is_never_moved(kind: str, few: ImageSet) -> None:
    with pytest.raises(ValueError, match=f"augmentation {kind} moves images, and the examples"):
        record(few, few.pixels() / 2, epochs=1, augmentation=kind)


def test_flipped_examples_are_weaker_than_those_that_were_crafted(
    classifier: Classifier, train_set: ImageSet
) -> None:
    """Why they are refused: the accuracy under x' and under x' flipped with its image."""
    some = head(train_set, 300)
    target = bind(Defense(classifier, None), "full", Draws(0, "attack", some.ids), 1)
    x, y, radius = some.pixels(), some.labels, Linf(norm="linf", eps_255=40.0)
    attacked = ascend(target, x, x, y, radius, 10, 0.25)
    clean, crafted, flipped = (
        (classifier(one).argmax(1) == classifier(whole).argmax(1)).float().mean()
        for one, whole in ((x, x), (attacked, x), (attacked.flip(3), x.flip(3)))
    )
    assert clean == 1 and flipped > crafted + 0.2


def move(image: Tensor, shown: Tensor) -> tuple[bool, int, int]:
    """Return how `shown` was made from `image`: flipped or not, and its shift (down, right)."""
    padded = nn.functional.pad(image, (4, 4, 4, 4))
    for flip in (False, True):
        source = padded.flip(2) if flip else padded
        for down in range(9):
            for right in range(9):
                if torch.equal(source[:, down : down + 8, right : right + 8], shown):
                    return flip, down - 4, right - 4
    raise AssertionError("neither a flip nor a crop of the image")


def test_moves_are_drawn_per_image_and_uniformly(train_set: ImageSet) -> None:
    marked = ImageSet(torch.zeros(1200, 1, 9, 9, dtype=torch.uint8), torch.zeros(1200).long(),
                      torch.arange(1200), ("a",))  # fmt: skip
    marked.images[:, 0, 4, 3] = 255  # left of the middle; a flip moves it to 5
    flipped = record(marked, epochs=1, batch_size=100, augmentation="flip")
    at = torch.cat([batch.images[:, 0, 4].argmax(1) for batch in flipped.batches])
    assert set(at.tolist()) == {3, 5} and abs((at == 5).float().mean() - 0.5) < 0.08
    marked.images[:, 0, 4] = 255 * (torch.arange(9) == 4)  # no crop loses the middle
    cropped = record(marked, epochs=1, batch_size=100, augmentation="flip_crop")
    rows = torch.cat([batch.images[:, 0].amax(2).argmax(1) for batch in cropped.batches])
    counts = torch.bincount(rows, minlength=9).double()
    assert ((counts - 1200 / 9) ** 2 / (1200 / 9)).sum() < 35, "8 degrees of freedom: p = 3e-5"
