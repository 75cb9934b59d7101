"""Square against a plain search: image by image, query by query, every question asked."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from toy_networks import Function
from toys import LINF

from components.attacks import L2, Linf
from components.attacks import square as square_module
from components.attacks.autoattack import AuthorsSquare
from components.attacks.contract import Outcome
from components.attacks.square import Square, patch_area, patch_side, two_pyramids
from components.data.draws import Draws
from components.models.defense import Defense, Target, bind, margin

QUERIES = 120
BALL = L2(norm="l2", eps_l2=1.0)
SHAPES = {"grey": (1, 9, 12), "RGB": (3, 6, 7)}
EVERY = pytest.mark.parametrize(
    ("colours", "threat", "attack"),
    [
        pytest.param(
            colours, threat, kind(kind="square", queries=QUERIES, eot=1),
            id=f"{colours}-{threat.norm}-{kind.__name__}",
        )
        for colours in SHAPES
        for threat in (LINF, BALL)
        for kind in (Square, AuthorsSquare)
    ],
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Images in float64, of a network in float64: the rounding of batches of any size is nothing.

    Bright images are right and hard to fool, dark ones are wrong.
    """

    defense: Defense
    images: Tensor
    labels: Tensor
    draws: Draws

    @classmethod
    def of(cls, shape: tuple[int, int, int]) -> "Task":
        """Return a task on images of one shape, many pixels of which are black or white."""
        generator, size = torch.Generator().manual_seed(5), shape[0] * shape[1] * shape[2]
        first, last = (
            torch.randn(*sides, generator=generator).double() for sides in ((size, 12), (12, 3))
        )
        noise = torch.rand(9, *shape, generator=generator).double() * 1.6 - 0.8
        images = (noise + torch.linspace(0.2, 0.8, 9)[:, None, None, None]).clamp(0, 1)

        def logits(x: Tensor) -> Tensor:
            bright = 40 * (x.flatten(1).mean(1, keepdim=True) - 0.4)
            found = (x.flatten(1) @ first / 6).tanh() @ last
            return found + bright * torch.tensor([1.0, 0, 0])

        defense = Defense(Function(logits), None).freeze()
        return cls(defense, images, torch.zeros(9).long(), Draws(5, "attack", torch.arange(9) * 3))

    def target(self) -> Target:
        """Return the target of an attack on all images."""
        return bind(self.defense, "full", self.draws, 1)


@dataclass
class Plain:
    """One image in the plain search: `x` (C,H,W) in float64, its margin, and what was counted."""

    task: Task
    row: int
    threat: Linf | L2
    attack: Square
    tried: int = 0
    equal: int = 0

    def run(self) -> tuple[Tensor, float]:
        """Return the image found and its margin."""
        self.origin = self.task.images[self.row]
        clean = self.margin(self.origin)
        if clean <= 0:
            return self.origin, clean
        x = self.start(self.draws(0))
        held = self.margin(x)
        for query in range(1, QUERIES + 1):
            if held <= 0:
                break
            stretched = QUERIES if self.attack.rescaled else None
            area, (height, width) = patch_area(query - 1, stretched), x.shape[1:]
            side = patch_side(area, height, width, self.threat)
            change = self.recolour if isinstance(self.threat, Linf) else self.move
            rival = change(x, side, self.draws(query))
            self.tried, self.equal = self.tried + 1, self.equal + torch.equal(rival, x)
            new = self.margin(rival)
            if new < held:
                x, held = rival, new
        return (x, held) if held <= clean else (self.origin, clean)

    def margin(self, x: Tensor) -> float:
        with torch.no_grad():
            return margin(self.task.defense(x[None]), self.task.labels[:1]).item()

    def draws(self, query: int) -> Draws:
        return self.task.draws[torch.tensor([self.row])].redraw(query)

    def corner(self, signs: Tensor) -> Tensor:
        """Return the image at the corner of the L-inf ball that `signs` name."""
        return (self.origin + self.threat.eps * signs).clamp(0, 1)

    def start(self, draws: Draws) -> Tensor:
        channels, height, width = self.origin.shape
        if isinstance(self.threat, Linf):
            return self.corner(signs(draws.uniform((channels, 1, width), "square")[0]))
        side = min(height, width) // 5
        rows, columns = height // side, width // side
        u = draws.uniform((channels + 1, rows, columns, 1, 1), "square")[0]
        delta = torch.zeros_like(self.origin)
        for row in range(rows):
            for column in range(columns):
                bump = two_pyramids(side).double()
                bump = bump if u[0, row, column] < 0.5 else bump.T
                top = (height - rows * side) // 2 + row * side
                left = (width - columns * side) // 2 + column * side
                tile = signs(u[1:, row, column]) * bump
                delta[:, top : top + side, left : left + side] = tile
        return self.scaled(delta)

    def scaled(self, delta: Tensor) -> Tensor:
        return (self.origin + delta / delta.norm() * self.threat.eps).clamp(0, 1)

    def recolour(self, x: Tensor, side: int, draws: Draws) -> Tensor:
        channels, height, width = x.shape
        u = draws.uniform((2 + channels,), "square")[0]
        window = self.window(u[:2], side, height, width)
        rival = x.clone()
        rival[window] = self.corner(signs(u[2:, None, None]))[window]
        return rival

    def move(self, x: Tensor, side: int, draws: Draws) -> Tensor:
        channels, height, width = x.shape
        u = draws.uniform((5 + channels,), "square")[0]
        first = self.window(u[:2], side, height, width)
        second = self.window(u[2:4], side, height, width)
        delta, both = x - self.origin, torch.zeros_like(x)
        both[first] = both[second] = 1
        unused = max(self.threat.eps**2 - delta.square().sum().item(), 0)
        budget = (unused / channels + (delta * both).square().sum((1, 2))).sqrt()
        bump = two_pyramids(side).double()
        bump = bump.T if u[4] < 0.5 else bump
        lengths = delta[first].square().sum((1, 2)).sqrt().clamp_min(1e-12)
        mixed = signs(u[5:, None, None]) * bump + delta[first] / lengths[:, None, None]
        filled = mixed * (budget / mixed.square().sum((1, 2)).sqrt())[:, None, None]
        delta[second] = 0
        delta[first] = filled
        return self.scaled(delta)

    def window(self, u: Tensor, side: int, height: int, width: int) -> tuple[slice, slice, slice]:
        last = 1 if self.attack.to_the_edge else 0
        top, left = (int(u[k] * (size - side + last)) for k, size in enumerate((height, width)))
        return slice(None), slice(top, top + side), slice(left, left + side)


def signs(u: Tensor) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0).double()


def attacked(task: Task, attack: Square, threat: Linf | L2) -> tuple[Outcome, Target]:
    target = task.target()
    return attack.run(target, task.images, task.labels, threat, task.draws), target


@EVERY
def test_the_search_finds_what_a_plain_one_finds(
    colours: str, threat: Linf | L2, attack: Square
) -> None:
    """Bit by bit under L-inf; under L2 sums are taken in another order."""
    task = Task.of(SHAPES[colours])
    found, target = attacked(task, attack, threat)
    plain = [Plain(task, row, threat, attack) for row in range(len(task.labels))]
    images, margins = zip(*(each.run() for each in plain), strict=True)
    tolerance = 0 if threat is LINF else 1e-9
    assert torch.allclose(found.images, torch.stack(images), rtol=0, atol=tolerance)
    assert torch.allclose(found.margin, torch.tensor(margins), rtol=0, atol=1e-6)
    fell = found.margin <= 0
    assert fell.any() and not fell.all()
    assert found.iterations.tolist() == [each.tried for each in plain]
    begun = torch.tensor([1 + (each.margin(each.origin) > 0) for each in plain])
    passes, spared = target.passes.forward, target.passes.spared
    assert torch.equal(passes + spared, found.iterations + begun)
    # What follows a change that was kept is asked about for nothing.
    equal = torch.tensor([each.equal if threat is LINF else 0 for each in plain])
    assert (spared <= equal).all() and (equal - spared).sum() < passes.sum() / 4
    if threat is LINF and colours == "grey":
        assert (equal[~fell] > 5).all() and (spared[~fell] > 0).all(), "no question was spared"


@EVERY
def test_an_accelerator_asks_all_and_finds_the_same(
    colours: str, threat: Linf | L2, attack: Square, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task.of(SHAPES[colours])
    found, target = attacked(task, attack, threat)
    monkeypatch.setattr(square_module, "_picks_rows", lambda device: False)
    everything, busy = attacked(task, attack, threat)
    assert torch.equal(everything.images, found.images)
    assert torch.equal(everything.iterations, found.iterations)
    assert torch.allclose(everything.margin, found.margin, rtol=0, atol=1e-6)
    both = target.passes.forward + target.passes.spared
    assert torch.equal(busy.passes.forward + busy.passes.spared, both)
    assert (busy.passes.spared <= 0).all()


@pytest.mark.parametrize("ahead", [1, 3, 16])
def test_how_many_changes_are_asked_about_at_once_changes_no_result(
    ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, attack = Task.of(SHAPES["RGB"]), Square(kind="square", queries=QUERIES, eot=1)
    found, _ = attacked(task, attack, LINF)
    monkeypatch.setattr(square_module, "AHEAD", ahead)
    monkeypatch.setattr(square_module, "PATIENCE", 1)
    same, target = attacked(task, attack, LINF)
    assert torch.equal(same.images, found.images)
    assert torch.equal(same.iterations, found.iterations)
    assert (target.passes.spared < 0).any() == (ahead > 1)
