"""What every purifier promises (`components.models.purifiers.contract`), as checks."""

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor

from components.data.draws import Draws, NoiseStream
from components.data.image_set import Shape
from components.models.purifiers import Purifier
from limpid.testing.check import (
    Check,
    Make,
    Setting,
    checks_of,
    random_streams,
    require,
    require_images,
    require_untouched,
    run_all,
    shuffled,
    state_of,
)

IMAGES = 12
# Other batches may be computed by other kernels: their results agree up to rounding.
ROUNDING = 1e-5
# A purifier that transforms only some images, by chance, has to move each of them in so many draws.
REDRAWS = 16


def check_purifier(
    make: Make, *, shape: Shape = (3, 32, 32), device: str | torch.device = "cpu",
    expected_to_fail: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Run all of `purifier_checks`; raise one AssertionError with a line for each that failed.

    `make()` returns a `Purifier` for images of `shape`, or a section with `build(shape)`.
    `expected_to_fail` maps names of checks to reasons: one of these that passes is listed too.
    Raises TypeError if `make` returns something else, ValueError for a name that is no check.
    """
    checks = purifier_checks(shape=shape, device=device)
    _made(checks[0].setting, make)
    run_all(checks, make, expected_to_fail or {})


def purifier_checks(
    *, shape: Shape = (3, 32, 32), device: str | torch.device = "cpu"
) -> list[Check]:
    """Return the checks of a purifier, each to be called with `make` as in `check_purifier`."""
    return checks_of(PROMISES, Setting(shape, 0, torch.device(device)))


def _made(setting: Setting, make: Make) -> Purifier:
    """Make a purifier, on its device, in eval mode, and without gradients of its weights."""
    built = make()
    if not isinstance(built, Purifier) and hasattr(built, "build"):
        built = built.build(setting.shape)
    if not isinstance(built, Purifier):
        raise TypeError(
            f"make returned {type(built).__name__}; it must return a Purifier, or a section with "
            "build(shape) that does"
        )
    return built.to(setting.device).eval().requires_grad_(False)


def _draws(setting: Setting, count: int = IMAGES) -> Draws:
    """Return the draws of images whose ids are not row numbers."""
    return Draws(0, "score", torch.arange(count, device=setting.device) * 11)


def _inputs(setting: Setting) -> tuple[Tensor, NoiseStream]:
    return setting.images(IMAGES), _draws(setting).stream()


def keeps_shape_dtype_device_and_range(setting: Setting, make: Make) -> None:
    """Images come back as images, in float32 and in float64; those given stay as they are."""
    images, stream = _inputs(setting)
    for dtype in (torch.float32, torch.float64):
        x = images.to(dtype)
        before = x.clone()
        purified = _made(setting, make).to(dtype)(x, stream)
        require_images(purified, before)
        require(torch.equal(x, before), "it changed the images that it was given, in place")


def extreme_images_stay_finite_and_in_range(setting: Setting, make: Make) -> None:
    """Black and white images, and one image alone."""
    purifier = _made(setting, make)
    for level, count in ((0.0, 4), (1.0, 4), (1.0, 1)):
        x = torch.full((count, *setting.shape), level, device=setting.device)
        require_images(purifier(x, _draws(setting, count).stream()), x)


def equal_noise_gives_equal_images(setting: Setting, make: Make) -> None:
    """All randomness comes from the stream."""
    purifier, (x, stream) = _made(setting, make), _inputs(setting)
    one = purifier(x, stream)
    torch.manual_seed(99)
    again = purifier(x, _draws(setting).stream())
    require(torch.equal(one, again), "the same images under equal noise came back different")


def stochastic_is_as_declared(setting: Setting, make: Make) -> None:
    """Other noise moves every image of a stochastic purifier, and none of a deterministic one."""
    purifier, (x, stream) = _made(setting, make), _inputs(setting)
    one, draws = purifier(x, stream), _draws(setting)
    moved = torch.zeros(IMAGES, dtype=torch.bool, device=setting.device)
    for draw in range(1, 1 + REDRAWS if purifier.stochastic else 3):
        moved |= _differ(purifier(x, draws.redraw(draw).stream()), one)
        if moved.all():
            break
    count = int(moved.sum())
    if purifier.stochastic:
        require(
            count == IMAGES,
            f"it says that it is stochastic, but other noise moved {count} of {IMAGES} images",
        )
    else:
        require(
            not count and torch.equal(purifier(x), one),
            "it says that it is deterministic, but its noise moved images",
        )


def noise_is_fresh_without_a_stream(setting: Setting, make: Make) -> None:
    """A stochastic purifier answers differently each time, and for equal images of one batch."""
    purifier = _made(setting, make)
    if not purifier.stochastic:
        return
    x, _ = _inputs(setting)
    require(not torch.equal(purifier(x), purifier(x)), "it drew the same noise twice")
    copies = purifier(x[:1].expand(REDRAWS, *setting.shape))
    require(_differ(copies[1:], copies[:1]).any(), "it drew one noise for the whole batch")


def differentiable_is_as_declared(setting: Setting, make: Make) -> None:
    """Every image has a finite gradient; it is zero exactly where it is declared unusable."""
    purifier, (x, stream) = _made(setting, make), _inputs(setting)
    gradient = _gradient(lambda x: purifier(x, stream), _inner(x))
    usable = int(gradient.flatten(1).ne(0).any(1).sum())
    if purifier.differentiable:
        require(
            usable == IMAGES,
            f"it says that it is differentiable, but {IMAGES - usable} of {IMAGES} images have a "
            "gradient of zero",
        )
    else:
        require(
            usable == 0,
            f"it says that it is not differentiable, but {usable} images have a gradient",
        )


def an_image_does_not_depend_on_its_batch(setting: Setting, make: Make) -> None:
    """Nothing of the others reaches it; order and size of the batch change it by rounding only."""
    purifier, (x, stream) = _made(setting, make), _inputs(setting)
    whole, order = purifier(x, stream), shuffled(IMAGES, setting.device)
    changed = x.clone()
    changed[1:] = 1 - changed[1:]
    require(
        torch.equal(purifier(changed, stream)[0], whole[0]),
        "an image changed with the others of its batch",
    )
    for rows in (order, order[:1], order[:7], order[5:]):
        off = (purifier(x[rows], stream[rows]) - whole[rows]).abs().max().item()
        require(off <= ROUNDING, f"in another batch of {len(rows)} a pixel moved by {off:.2g}")


def takes_images_and_noise_only(setting: Setting, make: Make) -> None:
    """No argument could carry labels, image ids or the purpose of the call."""
    purifier = _made(setting, make)
    for method in (purifier.forward, purifier.purify):
        names = list(inspect.signature(method).parameters)
        require(
            names == ["x", "stream"],
            f"{method.__name__} takes ({', '.join(names)}); it may take (x, stream)",
        )


def purifying_changes_no_state(setting: Setting, make: Make) -> None:
    """Weights and buffers stay, and eval mode stays on."""
    purifier, (x, stream) = _made(setting, make), _inputs(setting)
    before = state_of(purifier)
    purifier(x, stream)
    require_untouched(purifier, before)


def leaves_global_random_streams_alone(setting: Setting, make: Make) -> None:
    """Not even torch's, numpy's and Python's own random streams are drawn from."""
    purifier, (x, stream) = _made(setting, make), _inputs(setting)
    before = random_streams(setting.device)
    purifier(x, stream)
    require(random_streams(setting.device) == before, "it drew from a global random stream")


def stand_ins_purify_and_have_a_gradient(setting: Setting, make: Make) -> None:
    """Each returns images under keyed noise; a purifier without any raises NotImplementedError."""
    purifier, (x, stream) = _made(setting, make), _inputs(setting)
    x = _inner(x)
    for kind in purifier.stand_ins:
        purified = purifier.stand_in(kind, x, stream).detach()
        require_images(purified, x)
        again = purifier.stand_in(kind, x, stream)
        require(torch.equal(again, purified), f"stand-in {kind} gave other images for equal noise")
        gradient = _gradient(partial(purifier.stand_in, kind, stream=stream), x)
        require(
            gradient.flatten(1).ne(0).any(1).all(),
            f"stand-in {kind} has a gradient of zero for some images",
        )
    if not purifier.stand_ins:
        try:
            purifier.stand_in("direct", x, stream)
        except NotImplementedError:
            return
        raise AssertionError("stand_in works, but stand_ins names none")


def detector_score_is_of_each_image(setting: Setting, make: Make) -> None:
    """Finite, independent of the batch, and the same if the purified images are handed over."""
    purifier, (x, stream) = _made(setting, make), _inputs(setting)
    scores = purifier.detector_score(x, stream)
    require(
        scores.shape == (IMAGES,) and scores.isfinite().all(),
        f"the scores of {IMAGES} images have shape {tuple(scores.shape)}, or are not finite",
    )
    rows = shuffled(IMAGES, setting.device)[:3]
    alone = purifier.detector_score(x[rows], stream[rows])
    require(
        torch.allclose(alone, scores[rows], rtol=1e-3, atol=ROUNDING),
        "the score of an image depends on its batch",
    )
    require(purifier.detector_score(x).shape == (IMAGES,), "it gives no scores without a stream")
    handed = purifier.detector_score(x, stream, purifier(x, stream))
    require(torch.equal(handed, scores), "the score differs if the purified images are handed over")


def a_copy_purifies_as_the_original(setting: Setting, make: Make) -> None:
    """`deepcopy`, and a new object that loads the state; attacks and model folders rely on it."""
    purifier, (x, stream) = _made(setting, make), _inputs(setting)
    copied = deepcopy(purifier)
    torch.manual_seed(7)
    loaded = _made(setting, make)
    loaded.load_state_dict(purifier.state_dict())
    expected = purifier(x, stream)
    for name, other in (("deepcopy", copied), ("load_state_dict", loaded)):
        require(torch.equal(other(x, stream), expected), f"a copy by {name} purifies differently")


PROMISES = (
    keeps_shape_dtype_device_and_range,
    extreme_images_stay_finite_and_in_range,
    equal_noise_gives_equal_images,
    stochastic_is_as_declared,
    noise_is_fresh_without_a_stream,
    differentiable_is_as_declared,
    an_image_does_not_depend_on_its_batch,
    takes_images_and_noise_only,
    purifying_changes_no_state,
    leaves_global_random_streams_alone,
    stand_ins_purify_and_have_a_gradient,
    detector_score_is_of_each_image,
    a_copy_purifies_as_the_original,
)


def _inner(x: Tensor) -> Tensor:
    """Return images without black and white, where clipping would leave no gradient."""
    return 0.2 + 0.6 * x


def _differ(some: Tensor, others: Tensor) -> Tensor:
    """Return which images (N,) differ in any pixel."""
    return (some != others).flatten(1).any(1)


def _gradient(purify: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the finite gradient (N,C,H,W) of random sums of purified pixels; 0 if cut off."""
    point = x.clone().requires_grad_()
    with torch.enable_grad():
        purified = purify(point)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(purified.shape, generator=generator).to(purified)
    gradient = None
    if purified.requires_grad:
        (gradient,) = torch.autograd.grad((weights * purified).sum(), point, allow_unused=True)
    found = torch.zeros_like(point) if gradient is None else gradient
    require(found.isfinite().all(), "its gradient is not finite")
    return found
