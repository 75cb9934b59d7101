"""What every attack promises (`components.attacks.contract`), as checks.

They run on a small network of random weights, alone and behind keyed noise, in an L-inf and an L2
ball. Which of these four an attack takes, it says itself (`require_norm`, `require_fit`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.attacks import L2, SLACK, Attack, Linf
from components.attacks.contract import Outcome
from components.data.draws import Draws
from components.data.image_set import ImageSet, Shape
from components.models.accuracy import is_right
from components.models.defense import Defense, Mode, Passes, bind, margin
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
from limpid.testing.toys import Constant, Counting, NoisyBlur, labelled, recording, small_network

IMAGES, SMALL_BATCH = 16, 5
# The radius, as a multiple of the median distance at which the linearised network is fooled.
RADIUS = 1.5
# In float64 on both sides; pixels are float32.
ROUNDING = 1e-5
# Margins below this are on the boundary, where rounding to float32 decides.
EDGE = 1e-5


def check_attack(
    make: Make, *, shape: Shape = (3, 32, 32), classes: int = 10,
    device: str | torch.device = "cpu", expected_to_fail: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Run all of `attack_checks`; raise one AssertionError with a line for each that failed.

    `make()` returns an `Attack`; the fewer steps it takes, the sooner the checks end.
    `expected_to_fail` maps names of checks to reasons: one of these that passes is listed too.
    Raises TypeError if `make` returns something else, ValueError for a name that is no check.
    """
    _made(make)
    checks = attack_checks(shape=shape, classes=classes, device=device)
    run_all(checks, make, expected_to_fail or {})


def attack_checks(
    *, shape: Shape = (3, 32, 32), classes: int = 10, device: str | torch.device = "cpu"
) -> list[Check]:
    """Return the checks of an attack, each to be called with `make` as in `check_attack`."""
    return checks_of(PROMISES, Setting(shape, classes, torch.device(device)))


def _made(make: Make) -> Attack:
    built = make()
    if not isinstance(built, Attack):
        raise TypeError(f"make returned {type(built).__name__}; it must return an Attack")
    return built


@dataclass(frozen=True)
class _Way:
    """One of the four ways to run an attack: this ball, and noise or none before the network."""

    threat: Linf | L2
    noisy: bool

    def __str__(self) -> str:
        return f"{self.threat.norm}, {'stochastic' if self.noisy else 'deterministic'} defense"


class _Bench:
    """The network, its images, and two balls in which about every second image can be fooled."""

    def __init__(self, setting: Setting) -> None:
        self.device = setting.device
        self.network = Counting(small_network(setting.shape, setting.classes, setting.device))
        self.data = labelled(self.network, setting.shape, setting.classes, IMAGES)
        self.threats = _balls(self.network, self.data, setting.device)

    def ways(self, attack: Attack) -> Iterator[_Way]:
        """Yield the ways that the attack says it takes."""
        yield from (way for way in self.every_way() if _takes(attack, way))

    def in_one_norm(self, attack: Attack) -> Iterator[_Way]:
        """Yield those of the first norm that it takes, where the norm makes no difference."""
        ways = list(self.ways(attack))
        yield from (way for way in ways if way.threat == ways[0].threat)

    def every_way(self) -> Iterator[_Way]:
        """Yield all four."""
        yield from (_Way(threat, noisy) for threat in self.threats for noisy in (False, True))

    def run(
        self, attack: Attack, way: _Way, data: ImageSet | None = None, batch: int = IMAGES
    ) -> "_Found":
        """Attack all images, or those of `data`."""
        defense = self.defense(way).freeze()
        return attacked(attack, defense, self.data if data is None else data, way.threat, batch)

    def defense(self, way: _Way) -> Defense:
        """Return the network alone, or behind noise."""
        return Defense(self.network, NoisyBlur() if way.noisy else None)

    def pixels(self) -> Tensor:
        """The clean images (N,C,H,W)."""
        return self.data.pixels().to(self.device)


@dataclass(frozen=True)
class _Found:
    """What an attack returned, and the passes that its target counted."""

    outcome: Outcome
    passes: Passes

    def columns(self) -> dict[str, Tensor]:
        """Return everything (N,...) by name."""
        found, passes = self.outcome, self.passes
        return {
            "images": found.images, "margins": found.margin, "iterations": found.iterations,
            "forward passes": passes.forward, "backward passes": passes.backward,
        }  # fmt: skip


def attacked(
    attack: Attack, defense: Defense, data: ImageSet, threat: Linf | L2, batch: int,
    mode: Mode = "full",
) -> _Found:  # fmt: skip
    """Run the attack as `craft` does, on the defense itself."""
    device = next(defense.parameters()).device
    draws = Draws(0, "attack", data.ids.to(device))
    target = bind(defense, mode, draws, int(getattr(attack, "eot", 1)))
    images, labels = data.pixels().to(device), data.labels.clone().to(device)
    outcome = attack.run_in_batches(target, images, labels, threat, draws, batch)
    return _Found(outcome, target.passes)


def _takes(attack: Attack, way: _Way) -> bool:
    try:
        attack.require_norm(way.threat)
    except ValueError:
        return False
    return attack.fits(way.noisy)


def _balls(network: nn.Module, data: ImageSet, device: torch.device) -> tuple[Linf, L2]:
    """Return balls by the distances at which the network, linearised, is fooled."""
    x, labels = data.pixels().to(device).requires_grad_(), data.labels.to(device)
    with torch.enable_grad():
        margins = margin(network(x), labels)
    (gradient,) = torch.autograd.grad(margins.sum(), x)
    right, slopes = margins > 0, gradient.flatten(1)
    linf, l2 = (
        RADIUS * (margins / slopes.norm(dim=1, p=dual))[right].median().item() for dual in (1, 2)
    )
    return Linf(norm="linf", eps_255=min(255 * linf, 255.0)), L2(norm="l2", eps_l2=l2)


def runs_or_refuses_in_one_sentence(setting: Setting, make: Make) -> None:
    """What it says it does not take, it refuses by a ValueError that begins with its kind."""
    attack, bench = _made(make), _Bench(setting)
    require(any(True for _ in bench.ways(attack)), "it takes no norm and no defense at all")
    for way in bench.every_way():
        refusal = ""
        try:
            bench.run(attack, way)
        except ValueError as error:
            refusal = str(error)
            require(attack.kind in refusal, f"{way}: its refusal does not name it: {refusal}")
        takes = _takes(attack, way)
        require(not (takes and refusal), f"{way}: it says that it takes it, but refuses: {refusal}")
        require(takes or bool(refusal), f"{way}: it says that it does not take it, but runs")


def returns_one_image_for_each(setting: Setting, make: Make) -> None:
    """Finite float32 images in [0,1], each with its margin and a whole number of iterations."""
    attack, bench = _made(make), _Bench(setting)
    for way in bench.ways(attack):
        found = bench.run(attack, way).outcome
        require_images(found.images, bench.pixels())
        shapes = found.margin.shape, found.iterations.shape
        require(shapes == ((IMAGES,), (IMAGES,)), f"{way}: margins and iterations have {shapes}")
        require(found.iterations.dtype == torch.int64, f"{way}: iterations are no int64")


def stays_inside_the_ball(setting: Setting, make: Make) -> None:
    """A `bounded` attack does; others have a bound of their own, or minimise a distance."""
    attack, bench = _made(make), _Bench(setting)
    for way in bench.ways(attack) if attack.bounded else ():
        moved = way.threat.distance(bench.run(attack, way).outcome.images, bench.pixels())
        largest = moved.max().item()
        require(
            largest <= way.threat.eps + SLACK,
            f"{way}: an image moved by {largest:.6f}, the radius is {way.threat.eps:.6f}",
        )


def reports_no_success_that_is_none(setting: Setting, make: Make) -> None:
    """An image of margin 0 or less is misclassified, and no misclassified image is made right."""
    attack, bench = _made(make), _Bench(setting)
    labels = bench.data.labels.to(setting.device)
    clean = margin(bench.network(bench.pixels()), labels)
    for way in bench.ways(attack):
        if way.noisy:
            continue
        found = bench.run(attack, way).outcome
        logits = bench.network(found.images)
        right = is_right(logits, labels) & (margin(logits, labels) > EDGE)
        false = int((right & (found.margin <= 0)).sum())
        require(not false, f"{way}: it reports success on {false} images that are classified right")
        lost = int((right & (clean <= 0)).sum())
        require(not lost, f"{way}: it turned {lost} misclassified images into right ones")


def leaves_misclassified_images_alone(setting: Setting, make: Make) -> None:
    """If it stops early, on a deterministic defense (`stops_early`)."""
    attack, bench = _made(make), _Bench(setting)
    if not attack.stops_early():
        return
    clean = bench.pixels()
    wrong = margin(bench.network(clean), bench.data.labels.to(setting.device)) <= 0
    for way in bench.ways(attack):
        if not way.noisy:
            images = bench.run(attack, way).outcome.images
            require(
                torch.equal(images[wrong], clean[wrong]),
                f"{way}: it moved images that were misclassified from the start",
            )


def equal_seeds_give_equal_bytes(setting: Setting, make: Make) -> None:
    """All random choices come from the draws that it is given."""
    attack, bench = _made(make), _Bench(setting)
    for way in bench.ways(attack):
        one = bench.run(attack, way).columns()
        torch.manual_seed(99)
        again = bench.run(attack, way).columns()
        other = [name for name in one if not torch.equal(one[name], again[name])]
        require(not other, f"{way}: a second run gave other {', '.join(other)}")


def the_order_of_images_changes_none(setting: Setting, make: Make) -> None:
    """Choices are keyed by image, and no image depends on the others of its batch."""
    attack, bench = _made(make), _Bench(setting)
    for way in bench.ways(attack):
        _require_same(bench, attack, way, IMAGES, f"{way}: in another order")


def the_batch_size_changes_no_image(setting: Setting, make: Make) -> None:
    """Expected to fail for an attack that ranks the images of a batch to spend its passes."""
    attack, bench = _made(make), _Bench(setting)
    for way in bench.in_one_norm(attack):
        _require_same(bench, attack, way, SMALL_BATCH, f"{way}: in batches of {SMALL_BATCH}")


def _require_same(bench: _Bench, attack: Attack, way: _Way, batch: int, how: str) -> None:
    order = shuffled(IMAGES, torch.device("cpu"))
    rows = order.to(bench.device)
    whole = bench.run(attack, way).columns()
    other = bench.run(attack, way, bench.data[order], batch).columns()
    for name, column in whole.items():
        off = (other[name].double() - column[rows].double()).abs().nan_to_num(0).max().item()
        require(off <= ROUNDING, f"{how}, {name} differ by up to {off:.2g}")


def counts_every_pass(setting: Setting, make: Make) -> None:
    """It asks through the target, which counts, and adds nothing to the counters."""
    attack, bench = _made(make), _Bench(setting)
    for way in bench.ways(attack):
        if way.noisy:
            continue
        bench.network.passes = [0, 0]
        passes = bench.run(attack, way).passes
        made = bench.network.passes
        counted = int(passes.forward.sum()), int(passes.backward.sum())
        # `Target.classes` asks about one image, which nobody is charged with.
        free = made[0] - counted[0]
        require(
            0 <= free <= 1 and made[1] == counted[1],
            f"{way}: {made[0]} forward and {made[1]} backward passes were made, {counted[0]} and "
            f"{counted[1]} counted",
        )


def makes_the_passes_it_promises(setting: Setting, make: Make) -> None:
    """`effort` is the least cost of an image that was not fooled; under noise, of every image."""
    attack, bench = _made(make), _Bench(setting)
    for way in bench.ways(attack):
        found = bench.run(attack, way)
        promised = attack.effort(setting.classes, way.noisy)
        rows = (found.outcome.margin > 0) | way.noisy
        forward = (found.passes.forward + found.passes.spared)[rows]
        backward = found.passes.backward[rows]
        short = int(((forward < promised.forward) | (backward < promised.backward)).sum())
        require(
            not short,
            f"{way}: {short} images cost less than the {promised.forward} forward and "
            f"{promised.backward} backward passes that `effort` promises",
        )


def no_two_gradients_share_noise(setting: Setting, make: Make) -> None:
    """Nor is an image judged under noise that a gradient has followed, draw 0 excepted."""
    attack, bench = _made(make), _Bench(setting)
    for way in bench.in_one_norm(attack):
        if not way.noisy:
            continue
        followed: list[int] = []
        judged: set[int] = set()

        def record(draws: Draws, followed: list[int] = followed, judged: set[int] = judged) -> None:
            require(draws.role == "attack", f"it asked under noise of role {draws.role}")
            if torch.is_grad_enabled():
                followed.append(draws.draw)
            else:
                judged.add(draws.draw)

        defense = recording(bench.network, record).freeze()
        attacked(attack, defense, bench.data, way.threat, IMAGES)
        require(len(followed) == len(set(followed)), f"{way}: two gradients had the same noise")
        shared = sorted(judged.intersection(followed) - {0})
        require(
            not shared,
            f"{way}: it judged images under draws that a gradient had followed: {shared[:5]}",
        )


def changes_neither_model_nor_images(setting: Setting, make: Make) -> None:
    """Weights, gradients, modes, images, labels and torch's gradient switch are as they were."""
    attack, bench = _made(make), _Bench(setting)
    modes: tuple[Mode, ...] = ("full", "bpda")
    bench.network.requires_grad_(True)
    for way, mode in ((way, mode) for way in bench.in_one_norm(attack) for mode in modes):
        model = bench.defense(way).eval()
        before = state_of(model)
        pixels, labels = bench.pixels(), bench.data.labels.clone().to(setting.device)
        draws = Draws(0, "attack", bench.data.ids.to(setting.device))
        target = bind(model, mode, draws, int(getattr(attack, "eot", 1)))
        attack.run(target, pixels, labels, way.threat, draws)
        require_untouched(model, before)
        weights = list(model.parameters())
        require(all(weight.grad is None for weight in weights), f"{way}: weights have gradients")
        require(all(weight.requires_grad for weight in weights), f"{way}: it froze the weights")
        require(torch.equal(pixels, bench.pixels()), f"{way}: it changed the images, in place")
        same = torch.equal(labels.cpu(), bench.data.labels)
        require(same, f"{way}: it changed the labels, in place")
        require(torch.is_grad_enabled(), f"{way}: it left gradients switched off")


def leaves_global_random_streams_alone(setting: Setting, make: Make) -> None:
    """Not even torch's, numpy's and Python's own random streams are drawn from."""
    attack, bench = _made(make), _Bench(setting)
    for way in bench.ways(attack):
        before = random_streams(setting.device)
        bench.run(attack, way)
        same = random_streams(setting.device) == before
        require(same, f"{way}: it drew from a global random stream")


def takes_logits_that_are_nan_or_tied(setting: Setting, make: Make) -> None:
    """It ends, returns images, and takes none of them for robust."""
    attack, bench = _made(make), _Bench(setting)
    rest = setting.classes - 1
    for logits in ([torch.nan] * (rest + 1), [0.0] * rest + [torch.nan], [1.0] * (rest + 1)):
        bench.network = Counting(Constant(logits).to(setting.device))
        for way in bench.in_one_norm(attack):
            found = bench.run(attack, way).outcome
            require_images(found.images, bench.pixels())
            robust = bool((found.margin > 0).any())
            require(not robust, f"{way}: it takes images of logits {logits} for robust")


PROMISES = (
    runs_or_refuses_in_one_sentence,
    returns_one_image_for_each,
    stays_inside_the_ball,
    reports_no_success_that_is_none,
    leaves_misclassified_images_alone,
    equal_seeds_give_equal_bytes,
    the_order_of_images_changes_none,
    the_batch_size_changes_no_image,
    counts_every_pass,
    makes_the_passes_it_promises,
    no_two_gradients_share_noise,
    changes_neither_model_nor_images,
    leaves_global_random_streams_alone,
    takes_logits_that_are_nan_or_tied,
)
