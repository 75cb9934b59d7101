"""What stands before the network of another library: normalisation, resizing, and its weights file.

Limpid's images are pixels in [0,1] of the caller's size, and the radius of an attack is measured on
them. Whatever a network needs beside is part of it, so gradients pass through it. The libraries are
not imported: what they carry is read by the names of its attributes, and tested on stand-ins with
these attributes.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.nn import functional as F

Size = tuple[int, int]  # height, width

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
# Keys under which trainings store the weights, beside the state of their optimizer.
NESTED = ("state_dict", "model")
BY_HAND = "call preprocessed(network, mean, std, size) with the values of its training"


class ForeignError(ValueError):
    """A network, a purifier or a file from outside that cannot be used as it is."""


class Preprocessed(nn.Module):
    """A network behind resizing and normalisation: see `preprocessed`."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], size: Size | None
    ) -> None:
        super().__init__()
        self.network = network
        # Numbers, not a tuple: the identity of a network covers those of its attributes.
        self.height, self.width = size or (0, 0)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None])

    def resized(self, given: Size) -> Size | None:
        """Return the size that images of size `given` are brought to, or None if they keep it."""
        wanted = (self.height, self.width)
        return None if wanted in ((0, 0), given) else wanted

    def forward(self, x: Tensor) -> Any:
        """Return what the network makes of pixels (N,C,H,W) in [0,1].

        Raises ForeignError for another number of channels than `mean` has.
        """
        if x.shape[1] != len(self.mean):
            raise ForeignError(
                f"images have {x.shape[1]} channels, and the network's mean has {len(self.mean)}: "
                "convert the images to the channels that it was trained on"
            )
        if self.resized((x.shape[2], x.shape[3])):
            # Two products of matrices: the gradient of `interpolate` on CUDA adds in no fixed
            # order, and a number has to come out twice.
            x = _rows(x.shape[2], self.height, x) @ x @ _rows(x.shape[3], self.width, x).T
        return self.network((x - self.mean) / self.std)


def preprocessed(
    network: nn.Module, mean: Sequence[float], std: Sequence[float],
    size: int | Sequence[int] | None = None,
) -> Preprocessed:  # fmt: skip
    """Return the network behind its preprocessing: it takes pixels (N,C,H,W) in [0,1] of any size.

    `mean` and `std` (C,) are in units of pixels in [0,1]. With `size`, a side or (height, width),
    images of another size are resized first: bilinear, antialiased where they become smaller, and
    as a whole. Nothing is cropped, so that every pixel counts. Libraries often crop and take a
    bicubic filter; so the clean accuracy may differ a little from theirs. The radius of a threat
    stays one on the caller's pixels: a network behind a resizing faces another threat than at its
    own size. Mean 0 and std 1/255 give a network pixels up to 255; mean and std 0.5, pixels in
    [-1,1]. Raises ForeignError for values that cannot be.
    """
    if len(mean) != len(std) or not len(mean):
        raise ForeignError(
            f"mean has {len(mean)} values and std {len(std)}; both need one for each channel"
        )
    if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
        raise ForeignError(
            f"mean is {list(mean)} and std {list(std)}; they are in units of pixels in [0,1], and "
            "std is above 0: divide those of pixels up to 255 by 255"
        )
    return Preprocessed(network, mean, std, None if size is None else _size(size))


def from_timm(network: nn.Module) -> Preprocessed:
    """Return a timm network behind the preprocessing of its `pretrained_cfg` or `default_cfg`.

    Its `input_size` is that of the pretrained weights: a network that was trained on other images
    is for `preprocessed`. Raises ForeignError for a network without such a section.
    """
    section = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None)
    mean, std, shape = (_field(section, name) for name in ("mean", "std", "input_size"))
    if None in (mean, std, shape):
        raise ForeignError(
            f"this {type(network).__name__} carries no pretrained_cfg with mean, std and "
            f"input_size, as networks of timm do: {BY_HAND}"
        )
    return preprocessed(network, mean, std, tuple(shape)[-2:])


def from_torchvision(network: nn.Module, transforms: Any) -> Preprocessed:
    """Return a torchvision network behind the preprocessing of its weights.

    `transforms` is what `weights.transforms()` returns; its `mean`, `std` and `crop_size` are read.
    Raises ForeignError for an object without these.
    """
    mean, std, crop = (_field(transforms, name) for name in ("mean", "std", "crop_size"))
    if None in (mean, std, crop):
        raise ForeignError(
            f"this {type(transforms).__name__} has no mean, std and crop_size; give what "
            f"weights.transforms() returns, or {BY_HAND}"
        )
    return preprocessed(network, mean, std, crop)


def from_hugging_face(network: nn.Module, processor: Any) -> Preprocessed:
    """Return a Hugging Face classifier behind the preprocessing of its image processor.

    Read are `image_mean`, `image_std`, `size` or, with `do_center_crop`, `crop_size`, and the
    switches `do_resize` and `do_normalize`. Raises ForeignError for a processor without them, or
    one that does more: that does not scale pixels of 0 to 255 to [0,1], or turns colours around.
    """
    mean, std = _field(processor, "image_mean"), _field(processor, "image_std")
    if mean is None or std is None:
        raise ForeignError(
            f"this {type(processor).__name__} has no image_mean and image_std; give the image "
            f"processor of the network, or {BY_HAND}"
        )
    factor = _field(processor, "rescale_factor")
    scaled = _field(processor, "do_rescale") in (True, None) and (
        factor is None or abs(255 * factor - 1) < 1e-3
    )
    if not scaled or _field(processor, "rescale_offset"):
        raise ForeignError(
            f"this {type(processor).__name__} does not scale pixels of 0 to 255 to [0,1]; what its "
            f"network expects cannot be read from it: {BY_HAND}"
        )
    if _field(processor, "do_flip_channel_order"):
        raise ForeignError(
            f"this {type(processor).__name__} turns the colours around; do that inside of "
            "the network, then call preprocessed(network, mean, std, size)"
        )
    if _field(processor, "do_normalize") is False:
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    size = None
    if _field(processor, "do_resize") is not False:
        size = _field(processor, "crop_size" if _field(processor, "do_center_crop") else "size")
    return preprocessed(network, mean, std, size)


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU, for `load_state_dict`.

    A `.safetensors` file, or a file of `torch.save` (`.pt`, `.pth`, `.bin`) with a state dict, or
    with one under the key `state_dict` or `model`. Nothing is ever unpickled. Raises ForeignError
    for anything else: a missing file, a folder, another format, a whole pickled network.
    """
    path = Path(path)
    if path.is_dir():
        raise ForeignError(f"{path} is a folder; name the file of weights in it")
    if not path.is_file():
        raise ForeignError(f"{path} is not there; name a file of weights")
    if path.suffix not in WEIGHTS:
        raise ForeignError(f"{path} is no file of weights; it may end in {', '.join(WEIGHTS)}")
    if path.suffix == ".safetensors":
        try:
            found: dict[str, Tensor] = load_tensors(path.read_bytes())
            return found
        except SafetensorError as error:
            raise ForeignError(
                f"{path} is not a whole safetensors file ({error}); write it again"
            ) from None
    stored = _read_saved(path)
    for key in NESTED:
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
    if not isinstance(stored, Mapping) or not stored:
        raise ForeignError(
            f"{path} holds a {type(stored).__name__} and no tensors by name; save "
            "network.state_dict()"
        )
    strange = [str(name) for name, tensor in stored.items() if not isinstance(tensor, Tensor)]
    if strange:
        raise ForeignError(
            f"{path} holds {', '.join(strange[:3])}, which are no tensors; save "
            "network.state_dict() alone or under the key state_dict"
        )
    return {str(name): tensor.detach() for name, tensor in stored.items()}


def _read_saved(path: Path) -> Any:
    """Return what `torch.save` wrote, as far as it is tensors, numbers, texts and their lists."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ForeignError(
            f"{path} holds pickled objects, such as a whole network, and reading them could run "
            "any code; it may hold tensors by name: torch.save(network.state_dict(), path)"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise ForeignError(
            f"{path} cannot be read as a file of torch.save ({first_line(error)}); write it again"
        ) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _field(section: Any, name: str) -> Any:
    """Return a value of a mapping or an attribute of an object, None if it is not there."""
    return section.get(name) if isinstance(section, Mapping) else getattr(section, name, None)


def _size(size: Any) -> Size:
    """Return height and width from a side, one or two sides in a list, or sides by name."""
    edge = _field(size, "shortest_edge")
    height, width = _field(size, "height") or edge, _field(size, "width") or edge
    if isinstance(size, int):
        height = width = size
    elif isinstance(size, Sequence) and len(size) in (1, 2):
        height, width = size[0], size[-1]
    for side in (height, width):
        if not isinstance(side, int) or side < 1:
            raise ForeignError(
                f"size is {size!r}; it may be one side, or height and width, in whole pixels"
            )
    return height, width


def _rows(given: int, wanted: int, like: Tensor) -> Tensor:
    """Return the matrix (wanted, given) that resizes columns of `given` pixels, bilinearly."""
    unit = torch.eye(given, dtype=like.dtype, device=like.device)[None, None]
    with torch.no_grad():
        found = F.interpolate(unit, (wanted, given), mode="bilinear", antialias=True)
    return found[0, 0]
