"""The batches of a training, made on the device that trains: no step waits for the host.

Images cross to the device as bytes, and become float32 there. The set crosses once where it fits
into a part of the free memory of the device, else batch by batch through pinned memory. Order and
augmentation are drawn once an epoch, keyed by seed, epoch and image id.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.training.contract import Batch

# The part of a GPU's free memory that a tensor of the training set may take: weights, activations
# and other workers on the same GPU need the rest.
RESIDENT = 1 / 8
# The memory that the outputs of teachers may take in every worker: two for CIFAR-10 take 1.2 GB.
STORED = 2 << 30
PADDING = 4
MOVED = (
    "augmentation {} moves images, and the examples of the pool attack unmoved ones: set it to "
    "none, or attack in the loop (adversary: {{kind: classifier, ...}})"
)


class Batches:
    """Every image once an epoch in a new order; the remainder of an epoch is left out.

    (BatchNorm cannot train on a batch of one.) `attacked` (N,C,H,W) float32 is x' of the pool, in
    the order of `data`. Of each batch of `size` images, worker `rank` gets every `world`-th.

    `augmentation` (none, flip, flip_crop) moves images. With `attacked` it raises ValueError: an
    example that fools a classifier fools it less once it is flipped, so moved along with its image
    x' would be weaker than the attack that made it.
    """

    def __init__(
        self, data: ImageSet, attacked: Tensor | None, size: int, augmentation: str, seed: int,
        device: torch.device, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        if attacked is not None and augmentation != "none":
            raise ValueError(MOVED.format(augmentation))
        self.size, self.augmentation, self.seed = size, augmentation, seed
        self.device, self.rank, self.world = device, rank, world
        self.ids, self.labels = data.ids.to(device), data.labels.to(device)
        self.images = Rows(data.images, device)
        self.attacked = None if attacked is None else Rows(attacked, device)
        # A tensor: by a number, a GPU divides as it multiplies by the reciprocal, and rounds
        # twice. Pixels are to be those of the CPU to the bit.
        self.white = torch.tensor(255.0).to(device)
        self.taught: list[Rows] = []

    def __len__(self) -> int:
        return len(self.ids) // self.size

    def store(self, teach: Callable[[Batch], Sequence[Tensor]]) -> None:
        """Keep what `teach` returns for every image, for all epochs, where memory allows.

        Only without augmentation. The batches are as large as those of the training, because a
        convolution may round differently in a batch of another size.
        """
        count, size = len(self.ids), self.size // self.world
        stored: list[Tensor] = []
        for start in (*range(0, count - size, size), count - size):
            rows = torch.arange(start, start + size)
            there = rows.to(self.device)
            attacked = None if self.attacked is None else self.attacked.take(rows, there)
            batch = Batch(self._pixels(rows, there), self.labels[there], attacked)
            outputs = teach(batch)
            if not stored:
                if count * sum(one.nbytes for one in outputs) > STORED * size:
                    return
                stored = [
                    torch.empty(
                        (count, *one.shape[1:]), dtype=one.dtype, memory_format=_layout(one)
                    )
                    for one in outputs
                ]
            for whole, part in zip(stored, outputs, strict=True):
                whole[start : start + size] = part
        self.taught = [Rows(one, self.device) for one in stored]

    def epoch(self, epoch: int) -> Iterator[tuple[Batch, Draws]]:
        """Yield the batches of an epoch, numbered from 0, each with the keyed noise of its images.

        Noise is of role `train`, and new in every epoch.
        """
        key = self.seed * 1_000_003 + epoch
        order = torch.randperm(len(self.ids), generator=torch.Generator().manual_seed(key))
        there = order.to(self.device)
        ids, labels = self.ids.index_select(0, there), self.labels.index_select(0, there)
        draws = Draws(key, "train", ids)
        moves = _moves(self.augmentation, draws)
        for step in range(len(self)):
            rows = slice(step * self.size + self.rank, (step + 1) * self.size, self.world)
            images = self._pixels(order[rows], there[rows])
            images = _move(images, [move[rows] for move in moves])
            attacked = None
            if self.attacked is not None:
                attacked = self.attacked.take(order[rows], there[rows])
            # In the layout that a teacher gives: by it, sums over a batch round.
            taught = [
                one.take(order[rows], there[rows]).contiguous(memory_format=_layout(one.tensor))
                for one in self.taught
            ]
            batch = Batch(images, labels[rows], attacked, epoch * len(self) + step, taught)
            yield batch, replace(draws, ids=ids[rows])

    def _pixels(self, rows: Tensor, there: Tensor) -> Tensor:
        return self.images.take(rows, there).float() / self.white


class Rows:
    """A tensor (N,...) in main memory, whose rows are gathered onto a device."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self.device, self.resident = device, fits(tensor, device)
        self.tensor = tensor.to(device) if self.resident else tensor

    def take(self, rows: Tensor, there: Tensor) -> Tensor:
        """Return rows on the device: `rows` (B,) int64 numbers them, `there` is its copy there.

        The copy of a batch is not waited for. Torch gives its pinned memory to no other batch
        before it has arrived.
        """
        if self.resident:
            return self.tensor.index_select(0, there)
        pinned = self.device.type == "cuda"
        shape = (len(rows), *self.tensor.shape[1:])
        chosen = torch.empty(shape, dtype=self.tensor.dtype, pin_memory=pinned)
        torch.index_select(self.tensor, 0, rows, out=chosen)
        return chosen.to(self.device, non_blocking=True)


def _layout(tensor: Tensor) -> torch.memory_format:
    """Return the memory layout of images (N,C,H,W): torch's usual one, or channels last."""
    return torch.contiguous_format if tensor.is_contiguous() else torch.channels_last


def fits(tensor: Tensor, device: torch.device) -> bool:
    """Say whether a tensor takes at most `RESIDENT` of the free memory of a GPU."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return tensor.numel() * tensor.element_size() <= RESIDENT * free


def _moves(kind: str, draws: Draws) -> list[Tensor]:
    """Draw how every image moves: flipped or not (N,1,1,1), and its crop (N,2) of the padded."""
    moves = []
    if kind != "none":
        moves.append(draws.uniform((1, 1, 1), "flip") < 0.5)
    if kind == "flip_crop":
        moves.append((draws.uniform((2,), "crop") * (2 * PADDING + 1)).long())
    return moves


def _move(images: Tensor, moves: Sequence[Tensor]) -> Tensor:
    """Return images (N,C,H,W) after these moves."""
    if not moves:
        return images
    flip, *crop = moves
    images = torch.where(flip, images.flip(3), images)
    return _crop(images, crop[0]) if crop else images


def _crop(x: Tensor, shift: Tensor) -> Tensor:
    """Return crops of `x` (N,C,H,W), padded with black, from row and column `shift` (N,2) on."""
    padded = F.pad(x, (PADDING,) * 4)
    down = shift[:, 0, None] + torch.arange(x.shape[2], device=x.device)
    right = shift[:, 1, None] + torch.arange(x.shape[3], device=x.device)
    rows = torch.arange(len(x), device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[rows, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)
