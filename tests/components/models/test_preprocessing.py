"""Preprocessing inside of a network, what other libraries carry about it, and files of weights.

None of the libraries is asked: small objects with the same attributes stand for theirs.
"""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from toys import uniform_pixels

from components.models.foreign import ForeignError
from components.models.identity import identity
from components.models.preprocessing import (
    Preprocessed,
    from_hugging_face,
    from_timm,
    from_torchvision,
    preprocessed,
    read_weights,
)

X = uniform_pixels(4, (3, 12, 10))
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def normalised(x: Tensor) -> Tensor:
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


# Normalisation and size


def test_a_network_sees_normalised_pixels_of_the_callers_size() -> None:
    seen = preprocessed(nn.Identity(), MEAN, STD)
    assert torch.allclose(seen(X), normalised(X), atol=1e-6)
    assert seen.resized((12, 10)) is None


@pytest.mark.parametrize("size", [(7, 5), (24, 30), (12, 5), (12, 10)])
def test_resizing_is_torchs_bilinear_antialiased_one(size: tuple[int, int]) -> None:
    network = preprocessed(nn.Identity(), MEAN, STD, size)
    expected = F.interpolate(X, size, mode="bilinear", antialias=True)
    assert torch.allclose(network(X), normalised(expected), atol=1e-5)
    assert network.resized((12, 10)) == (None if size == (12, 10) else size)
    point, same = X.double().requires_grad_(), X.double().requires_grad_()
    found = network.double()(point).sin().sum()
    wanted = F.interpolate(same, size, mode="bilinear", antialias=True)
    wanted = ((wanted - network.mean) / network.std).sin().sum()
    gradients = [torch.autograd.grad(*pair)[0] for pair in ((found, point), (wanted, same))]
    assert torch.allclose(*gradients) and gradients[0].abs().max() > 0


def test_constant_images_stay_constant_and_one_size_is_a_square() -> None:
    network = preprocessed(nn.Identity(), [0.0], [1.0], 6)
    assert torch.allclose(network(torch.full((2, 1, 9, 4), 0.3)), torch.full((2, 1, 6, 6), 0.3))


def test_mean_std_and_size_are_part_of_the_identity() -> None:
    networks = [
        preprocessed(nn.Identity(), MEAN, STD), preprocessed(nn.Identity(), STD, STD),
        preprocessed(nn.Identity(), MEAN, MEAN), preprocessed(nn.Identity(), MEAN, STD, 8),
        preprocessed(nn.Identity(), MEAN, STD, (8, 9)),
    ]  # fmt: skip
    assert len({identity(network) for network in networks}) == len(networks)


@pytest.mark.parametrize(
    ("mean", "std", "size", "sentence"),
    [
        ((0.5,), (0.5, 0.5), None, "mean has 1 values and std 2; both need one for each channel"),
        ((), (), None, "mean has 0 values"),
        ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4), None, "divide those of pixels up to 255"),
        (MEAN, (0.2, 0.0, 0.2), None, "std is above 0"),
        (MEAN, STD, (3, 8, 8), r"size is \(3, 8, 8\); it may be one side, or height and width"),
        (MEAN, STD, 0, "size is 0"),
        (MEAN, STD, 8.5, "size is 8.5; .* whole pixels"),
    ],
)
def test_values_that_cannot_be_end_in_one_sentence(
    mean: Any, std: Any, size: Any, sentence: str
) -> None:
    with pytest.raises(ForeignError, match=sentence):
        preprocessed(nn.Identity(), mean, std, size)


def test_images_of_other_channels_end_in_one_sentence() -> None:
    """Broadcasting would silently make three channels of one."""
    with pytest.raises(ForeignError, match=r"images have 1 channels, and .* mean has 3"):
        preprocessed(nn.Identity(), MEAN, STD)(X[:, :1])


# What libraries carry


def carrying(**attributes: Any) -> nn.Module:
    """Return a network with these attributes."""
    network = nn.Identity()
    for name, value in attributes.items():
        setattr(network, name, value)
    return network


def processor(**changes: Any) -> SimpleNamespace:
    """Return the attributes of a Hugging Face image processor for 8 x 8 pixels."""
    section = {
        "image_mean": list(MEAN), "image_std": list(STD), "size": {"height": 8, "width": 8},
        "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    }  # fmt: skip
    return SimpleNamespace(**{**section, **changes})


SECTION = {"mean": MEAN, "std": STD, "input_size": (3, 8, 6), "crop_pct": 0.875}
PRESET = {"mean": list(MEAN), "std": list(STD), "crop_size": [8], "resize_size": [9]}
CARRIED: dict[str, tuple[Preprocessed, tuple[int, int]]] = {
    "timm": (from_timm(carrying(pretrained_cfg=SECTION)), (8, 6)),
    "timm, as an object": (from_timm(carrying(pretrained_cfg=SimpleNamespace(**SECTION))), (8, 6)),
    "timm, older": (from_timm(carrying(default_cfg=SECTION)), (8, 6)),
    "torchvision": (from_torchvision(nn.Identity(), SimpleNamespace(**PRESET)), (8, 8)),
    "torchvision, two sides": (
        from_torchvision(nn.Identity(), SimpleNamespace(**{**PRESET, "crop_size": [8, 6]})), (8, 6),
    ),
    "processor": (from_hugging_face(nn.Identity(), processor()), (8, 8)),
    "processor, a side": (from_hugging_face(nn.Identity(), processor(size=6)), (6, 6)),
    "processor, an edge": (
        from_hugging_face(nn.Identity(), processor(size={"shortest_edge": 8})), (8, 8),
    ),
    "processor, an object": (
        from_hugging_face(nn.Identity(), processor(
            size=SimpleNamespace(shortest_edge=None, height=8, width=6)
        )), (8, 6),
    ),
    "processor, a crop": (
        from_hugging_face(nn.Identity(), processor(
            size={"shortest_edge": 9}, do_center_crop=True, crop_size={"height": 8, "width": 8}
        )), (8, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CARRIED)
def test_mean_std_and_size_are_read_from_what_a_library_carries(name: str) -> None:
    network, size = CARRIED[name]
    expected = normalised(F.interpolate(X, size, mode="bilinear", antialias=True))
    assert torch.allclose(network(X), expected, atol=1e-5)
    assert network.resized((12, 10)) == size


def test_the_switches_of_a_processor_are_obeyed() -> None:
    bare = from_hugging_face(nn.Identity(), processor(do_resize=False, do_normalize=False))
    assert torch.equal(bare(X), X)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: from_timm(nn.Identity()), "carries no pretrained_cfg .* call preprocessed"),
        (lambda: from_timm(carrying(pretrained_cfg={"mean": MEAN})), "carries no pretrained_cfg"),
        (lambda: from_torchvision(nn.Identity(), "weights"), r"str has no mean, .*transforms\(\)"),
        (lambda: from_hugging_face(nn.Identity(), object()), "object has no image_mean"),
        (
            lambda: from_hugging_face(nn.Identity(), processor(do_rescale=False)),
            r"does not scale pixels of 0 to 255 to \[0,1\]",
        ),
        (
            lambda: from_hugging_face(nn.Identity(), processor(rescale_factor=1 / 127.5)),
            "does not scale pixels of 0 to 255",
        ),
        (
            lambda: from_hugging_face(nn.Identity(), processor(rescale_offset=True)),
            "does not scale pixels of 0 to 255",
        ),
        (
            lambda: from_hugging_face(nn.Identity(), processor(do_flip_channel_order=True)),
            "turns the colours around",
        ),
        (
            lambda: from_hugging_face(nn.Identity(), processor(size={"longest_edge": 8})),
            "size is .*longest_edge.*; it may be one side",
        ),
    ],
)
def test_what_cannot_be_read_ends_in_one_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(ForeignError, match=sentence) as caught:
        make()
    assert "\n" not in str(caught.value)


# Weights


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(3, 2)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin"])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_weights_are_read_from_every_format(name: str, key: str | None, tmp_path: Path) -> None:
    state, path = linear().state_dict(), tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({key: state, "epoch": 3, "name": "run"} if key else state, path)
    found = read_weights(path)
    assert sorted(found) == ["bias", "weight"]
    assert all(torch.equal(found[part], state[part]) for part in state)
    nn.Linear(3, 2).load_state_dict(read_weights(str(path)))


def test_parameters_are_read_without_their_graph(tmp_path: Path) -> None:
    torch.save(dict(linear().named_parameters()), tmp_path / "w.pt")
    assert not any(found.requires_grad for found in read_weights(tmp_path / "w.pt").values())


class Touch:
    """Writes a file if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    torch.save({"state_dict": {}, "trap": Touch(seen)}, tmp_path / "new.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Touch(seen), protocol=2))
    torch.save(linear(), tmp_path / "whole.pth")
    for name in ("new.pt", "old.pt", "whole.pth"):
        with pytest.raises(ForeignError, match=r"holds pickled objects, .*network.state_dict\(\)"):
            read_weights(tmp_path / name)
    assert not seen.exists()


def test_files_that_hold_no_weights_end_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "net.onnx").touch()
    (tmp_path / "empty.pt").touch()
    (tmp_path / "torn.safetensors").write_bytes(b"\x10")
    save_file(linear().state_dict(), tmp_path / "whole.safetensors")
    torch.save(linear().state_dict(), tmp_path / "whole.pt")
    for name in ("whole.pt", "whole.safetensors"):
        (tmp_path / f"half.{name}").write_bytes((tmp_path / name).read_bytes()[:-40])
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({}, tmp_path / "nothing.pt")
    torch.save({"weight": torch.ones(2), "epoch": 3}, tmp_path / "mixed.pt")
    sentences = {
        "folder.pt": "is a folder; name the file of weights in it",
        "absent.pt": "is not there; name a file",
        "net.onnx": "is no file of weights; it may end in .safetensors, .pt",
        "empty.pt": "cannot be read",
        "half.whole.pt": "cannot be read",
        "torn.safetensors": "is not a whole safetensors file",
        "half.whole.safetensors": "is not a whole safetensors file",
        "list.pt": r"holds a list and no tensors by name; save network.state_dict\(\)",
        "nothing.pt": "no tensors by name",
        "mixed.pt": "holds epoch, which are no tensors; save",
    }
    for name, sentence in sentences.items():
        with pytest.raises(ForeignError, match=sentence) as caught:
            read_weights(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
