"""What a classifier has to keep so that attacks and scores mean what they say, as checks."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import nn

from components.data.draws import Draws
from components.data.image_set import Shape
from components.models.defense import Defense, fold_batch_norm
from limpid.testing.check import (
    Check,
    Make,
    Setting,
    checks_of,
    random_streams,
    require,
    require_untouched,
    run_all,
    shuffled,
    state_of,
)

IMAGES = 16
# A classifier that is random by chance has to move each image in so many draws.
REDRAWS = 16
# Other batches may be computed by other kernels: their results agree up to rounding, as a fraction
# of the largest logit.
ROUNDING = 1e-4


def check_classifier(
    make: Make, *, shape: Shape = (3, 32, 32), classes: int = 10,
    device: str | torch.device = "cpu", expected_to_fail: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Run all of `classifier_checks`; raise one AssertionError with a line for each that failed.

    `make(shape, classes)` returns an `nn.Module` that takes pixels (N,C,H,W) in [0,1] and returns
    logits (N,K); `build` of a section of ours does. One with a true `stochastic` takes
    `(x, stream)`, and all its noise comes from the stream. `expected_to_fail` maps names of checks
    to reasons: one of these that passes is listed too. Raises TypeError if `make` returns something
    else, ValueError for a name that is no check.
    """
    checks = classifier_checks(shape=shape, classes=classes, device=device)
    _made(checks[0].setting, make)
    run_all(checks, make, expected_to_fail or {})


def classifier_checks(
    *, shape: Shape = (3, 32, 32), classes: int = 10, device: str | torch.device = "cpu"
) -> list[Check]:
    """Return the checks of a classifier, each to be called with `make` as in `check_classifier`."""
    return checks_of(PROMISES, Setting(shape, classes, torch.device(device)))


def _made(setting: Setting, make: Make) -> Defense:
    """Make a classifier, on its device, in eval mode, and without gradients of its weights.

    It is called as a defense without a purifier, with draws: a random one gets a stream of them.
    """
    built = make(setting.shape, setting.classes)
    if not isinstance(built, nn.Module):
        raise TypeError(f"make returned {type(built).__name__}; it must return a torch nn.Module")
    return Defense(built, None).to(setting.device).eval().requires_grad_(False)


def _draws(setting: Setting, count: int = IMAGES) -> Draws:
    """Return the draws of images whose ids are not row numbers."""
    return Draws(0, "score", torch.arange(count, device=setting.device) * 11)


def returns_logits(setting: Setting, make: Make) -> None:
    """One finite number per class, in the dtype of the images: no probabilities, no constants."""
    for dtype in (torch.float32, torch.float64):
        x = setting.images(IMAGES).to(dtype)
        before = x.clone()
        logits = _made(setting, make).to(dtype)(x, _draws(setting))
        wanted = (IMAGES, setting.classes)
        require(
            logits.shape == wanted and logits.dtype == dtype,
            f"{dtype} images gave {logits.dtype} of shape {tuple(logits.shape)}; logits of shape "
            f"{wanted} in {dtype} are needed",
        )
        require(logits.isfinite().all(), "some logits are not finite")
        require(logits.std(0).max() > 0, "it gave all images the same logits")
        sums = logits.sum(1)
        require(
            logits.min() < 0 or not torch.allclose(sums, torch.ones_like(sums)),
            "its outputs are probabilities: return the logits before the softmax",
        )
        require(torch.equal(x, before), "it changed the images that it was given, in place")


def extreme_images_give_finite_logits(setting: Setting, make: Make) -> None:
    """Black and white images, and one image alone."""
    model = _made(setting, make)
    for level, count in ((0.0, 4), (1.0, 4), (1.0, 1)):
        x = torch.full((count, *setting.shape), level, device=setting.device)
        logits = model(x, _draws(setting, count))
        require(
            logits.shape == (count, setting.classes) and logits.isfinite().all(),
            f"{count} images of level {level:g} gave logits of shape {tuple(logits.shape)}, or "
            "some that are not finite",
        )


def equal_images_give_equal_logits(setting: Setting, make: Make) -> None:
    """Under equal noise: all randomness comes from the stream, and only if it is declared."""
    model, x = _made(setting, make), setting.images(IMAGES)
    one = model(x, _draws(setting))
    torch.manual_seed(99)
    require(
        torch.equal(model(x, _draws(setting)), one),
        "the same images got other logits the second time; a random classifier says `stochastic = "
        "True`, and takes all its noise from the stream",
    )


def other_noise_gives_other_logits(setting: Setting, make: Make) -> None:
    """Every image of a random classifier: by another draw, and each time without a stream."""
    model, x = _made(setting, make), setting.images(IMAGES)
    if not model.stochastic:
        return
    one, moved = model(x, _draws(setting)), torch.zeros(IMAGES, dtype=torch.bool, device=x.device)
    for draw in range(1, 1 + REDRAWS):
        moved |= (model(x, _draws(setting).redraw(draw)) != one).any(1)
    count = int(moved.sum())
    require(
        count == IMAGES,
        f"it says that it is stochastic, but other noise moved {count} of {IMAGES} images",
    )
    require(
        any(not torch.equal(model(x), model(x)) for _ in range(REDRAWS)),
        "without a stream it gave equal logits every time: it has noise of its own",
    )


def an_image_does_not_depend_on_its_batch(setting: Setting, make: Make) -> None:
    """Equal up to rounding in any order and any size of batch."""
    model, x = _made(setting, make), setting.images(IMAGES)
    draws, order = _draws(setting), shuffled(IMAGES, setting.device)
    whole = model(x, draws)
    for rows in (order, order[:1], order[:7]):
        off = ((model(x[rows], draws[rows]) - whole[rows]).abs().max() / whole.abs().max()).item()
        require(
            off <= ROUNDING,
            f"in another batch of {len(rows)} a logit moved by {off:.2g} of the largest",
        )


def every_image_has_a_gradient(setting: Setting, make: Make) -> None:
    """Attacks follow it; it is finite and nowhere zero for a whole image."""
    x = setting.images(IMAGES).requires_grad_()
    with torch.enable_grad():
        logits = _made(setting, make)(x, _draws(setting))
    require(logits.requires_grad, "the logits are cut off from the graph of the images")
    weights = torch.arange(setting.classes, device=x.device).to(logits)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), x)
    require(gradient.isfinite().all(), "its gradient is not finite")
    require(gradient.flatten(1).ne(0).any(1).all(), "some images have a gradient of zero")


def answering_changes_no_state(setting: Setting, make: Make) -> None:
    """Weights and buffers stay, and eval mode stays on."""
    model = _made(setting, make)
    before = state_of(model)
    model(setting.images(IMAGES), _draws(setting))
    require_untouched(model, before)


def leaves_global_random_streams_alone(setting: Setting, make: Make) -> None:
    """Not even torch's, numpy's and Python's own random streams are drawn from."""
    model, x = _made(setting, make), setting.images(IMAGES)
    before = random_streams(setting.device)
    model(x, _draws(setting))
    require(random_streams(setting.device) == before, "it drew from a global random stream")


def a_copy_answers_as_the_original(setting: Setting, make: Make) -> None:
    """`deepcopy`, and a new object that loads the state; attacks and model folders rely on it."""
    model, x = _made(setting, make), setting.images(IMAGES)
    copied = deepcopy(model)
    torch.manual_seed(7)
    loaded = _made(setting, make)
    loaded.load_state_dict(model.state_dict())
    expected = model(x, _draws(setting))
    for name, other in (("deepcopy", copied), ("load_state_dict", loaded)):
        require(
            torch.equal(other(x, _draws(setting)), expected),
            f"a copy by {name} answers differently",
        )


def the_folded_copy_answers_as_the_original(setting: Setting, make: Make) -> None:
    """Attacks run on a copy whose BatchNorms are folded into the convolutions before them."""
    model, x, draws = _made(setting, make), setting.images(IMAGES), _draws(setting)
    folded, logits = fold_batch_norm(model)(x, draws), model(x, draws)
    off = ((folded - logits).abs().max() / logits.abs().max()).item()
    require(
        off <= ROUNDING,
        f"with its BatchNorms folded a logit moves by {off:.2g} of the largest: a Sequential has "
        "to call its parts in their order",
    )


PROMISES = (
    returns_logits,
    extreme_images_give_finite_logits,
    equal_images_give_equal_logits,
    other_noise_gives_other_logits,
    an_image_does_not_depend_on_its_batch,
    every_image_has_a_gradient,
    answering_changes_no_state,
    leaves_global_random_streams_alone,
    a_copy_answers_as_the_original,
    the_folded_copy_answers_as_the_original,
)
