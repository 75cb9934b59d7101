"""StAdv (Xiao et al. 2018): displace pixels instead of changing their values.

A flow field (N,H,W,2) displaces the grid at which the image is sampled, bilinearly. Coordinates are
those of the sampling grid, in which every image extends from -1 to 1: a flow of `bound` moves a
pixel by at most bound * W / 2 columns and bound * H / 2 rows. So the literature's StAdv 0.05
(Laidlaw et al. 2021 and later work with their attack) is `bound: 0.05`, which is 0.8 of a pixel at
32 x 32, with `smoothness: 0.05`.

Departures from Xiao et al.: the flow is bounded, where they only penalise its roughness; and it is
optimised by projected sign-gradient steps, where they run L-BFGS.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from components.attacks.contract import (
    L2,
    Attack,
    Cost,
    Linf,
    LossFamily,
    Outcome,
    Positive,
)
from components.attacks.search import Search, search_cost
from components.data.draws import Draws
from components.models.defense import Target, margin


class StAdv(Attack):
    """`steps` steps that minimise the margin plus `smoothness` times the roughness of the flow.

    They start from a random flow. Each moves the flow by `step` times `bound` along the sign of the
    gradient and clips it to `bound`, on both axes of every pixel. The threat is ignored: there is
    no L-inf or L2 ball. The flow is not returned, so an image alone shows only that every pixel
    lies between the least and the largest value within reach; the bound itself rests on the clip.
    """

    bounded: ClassVar[bool] = False
    early_stopping: ClassVar[bool] = True
    losses: ClassVar[tuple[LossFamily, ...]] = ("margin",)

    kind: Literal["stadv"]
    bound: Annotated[float, Field(gt=0, le=2)]
    steps: Positive
    step: Annotated[float, Field(gt=0)]
    smoothness: Annotated[float, Field(ge=0)]
    eot: Positive

    def region(self, primary: Linf | L2) -> str:
        """Return the label of the flow's bound, in half widths of the image."""
        return f"flow {self.bound:g}"

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One gradient per step, and one query of the last image."""
        return search_cost(self.steps, 1, self.draws(stochastic), stochastic)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the displaced image of lowest margin, or the clean one if none is lower."""
        search = Search(target, images, labels, threat, early_stop=True)
        # At zero flow the bilinear gradient sees only one neighbour per axis: start at random.
        noise = draws[search.rows].uniform((*images.shape[2:], 2), "flow").to(images.dtype)
        flow = (self.step * self.bound * (2 * noise - 1)).clamp(-self.bound, self.bound)
        for _ in range(self.steps):
            if not len(search.rows):
                break
            flow.requires_grad_()
            displaced, rough = displace(search.origin, flow), roughness(flow).sum()
            found = search.evaluate(displaced.detach(), margin)
            (slope,) = torch.autograd.grad(
                [displaced, rough], flow, [found.gradient, rough.new_tensor(self.smoothness)]
            )
            flow = flow.detach() - self.step * self.bound * slope.sign()
            (flow,) = search.drop_fooled(flow.clamp(-self.bound, self.bound))
        if len(search.rows):
            search.query(displace(search.origin, flow))
        return search.outcome()


def displace(images: Tensor, flow: Tensor) -> Tensor:
    """Sample `images` (N,C,H,W) at the grid displaced by `flow` (N,H,W,2: column, row), in [0,1].

    Beyond its edge an image continues with the value at the edge.
    """
    still = torch.eye(2, 3, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(still, list(images.shape), align_corners=False)
    sampled = F.grid_sample(images, grid + flow, padding_mode="border", align_corners=False)
    return sampled.clamp(0, 1)


def roughness(flow: Tensor) -> Tensor:
    """Return the flow loss (N,) of equation 4: differences of each flow to its 4 neighbours."""
    total = flow.new_zeros(len(flow))
    for difference in (flow.diff(dim=1), flow.diff(dim=2)):
        # Every pair counts twice, once from either end. The 1e-12 keeps the gradient finite at 0.
        total = total + 2 * (difference.square().sum(3) + 1e-12).sqrt().flatten(1).sum(1)
    return total
