"""StAdv (Xiao et al. 2018): every pixel is taken from a little way off, along a flow.

A flow (N,H,W,2) displaces the grid at which the image is read, bilinearly; what is attacked is
where pixels lie, not what they are. Coordinates are those of the sampling grid, in which every
image reaches from -1 to 1: a flow of `bound` moves a pixel by bound * W / 2 columns and
bound * H / 2 rows at most. So the literature's StAdv 0.05 (Laidlaw et al. 2021, and all who use
their attack) is `bound: 0.05`, at 32 x 32 pixels 0.8 of a pixel, and their smoothness is 0.05.

Deviations from Xiao et al.: the bound (they have none, and only the smoothness to hold the flow
back), and steps along the sign of the gradient, projected back, where they run L-BFGS.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from components.attacks.contract import L2, Attack, Linf, Outcome, Positive, Search
from components.data.draws import Draws
from components.models.defense import Target, margin


class StAdv(Attack):
    """`steps` descents of the margin plus `smoothness` times the roughness, from a random flow.

    Each step moves the flow by `step` times `bound` along the sign and clips it to `bound`, on
    either axis of every pixel. It knows no L-inf or L2 ball, and the radius of the threat is of no
    account. The flow itself is not returned: that it keeps the bound is held by the clip, after
    which images are read, and can be seen on them only in that every pixel lies between the least
    and the largest in its reach.
    """

    bounded: ClassVar[bool] = False
    stopping: ClassVar[bool] = True

    kind: Literal["stadv"]
    bound: Annotated[float, Field(gt=0, le=2)]
    steps: Positive
    step: Annotated[float, Field(gt=0)]
    smoothness: Annotated[float, Field(ge=0)]
    eot: Positive

    def effort(self) -> int:
        """Every step is one pass."""
        return self.steps

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the displaced image of lowest margin, the clean one where none is lower."""
        search = Search(target, images, labels, drop=True)
        # A pixel at rest sees one of its two neighbours on an axis: the first step is a random one.
        noise = draws[search.rows].uniform((*images.shape[2:], 2), "flow").to(images.dtype)
        flow = (self.step * self.bound * (2 * noise - 1)).clamp(-self.bound, self.bound)
        for _ in range(self.steps):
            if not len(search.rows):
                break
            flow.requires_grad_()
            displaced, rough = displace(search.origin, flow), roughness(flow).sum()
            seen = search.evaluate(displaced.detach(), margin)
            (slope,) = torch.autograd.grad(
                [displaced, rough], flow, [seen.gradient, rough.new_tensor(self.smoothness)]
            )
            flow = flow.detach() - self.step * self.bound * slope.sign()
            flow = flow.clamp(-self.bound, self.bound)[search.alive()]
        if len(search.rows):
            search.query(displace(search.origin, flow))
        return search.outcome()


def displace(images: Tensor, flow: Tensor) -> Tensor:
    """Read every pixel of `images` (N,C,H,W) where `flow` (N,H,W,2: column, row) says; in [0,1].

    Beyond the edge the image goes on as it ends there.
    """
    still = torch.eye(2, 3, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(still, list(images.shape), align_corners=False)
    read = F.grid_sample(images, grid + flow, padding_mode="border", align_corners=False)
    return read.clamp(0, 1)


def roughness(flow: Tensor) -> Tensor:
    """Return the flow loss (N,) of equation 4: how far each pixel parts from its 4 neighbours."""
    total = flow.new_zeros(len(flow))
    for part in (flow.diff(dim=1), flow.diff(dim=2)):
        # Every pair is met from both of its ends; a root has no slope at 0 without the 1e-12.
        total = total + 2 * (part.square().sum(3) + 1e-12).sqrt().flatten(1).sum(1)
    return total
