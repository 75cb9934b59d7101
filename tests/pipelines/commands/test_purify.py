"""Image files become what the purifier makes of them; none is lost or half written."""

import io
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import project
import pytest
import torch
from PIL import Image
from torch import Tensor
from toys import write_model

from components.models.checkpoints import load
from pipelines.__main__ import main
from pipelines.commands._cleaning import GAP, SIDE_BY_SIDE

AUTOENCODER = {
    "kind": "conv_autoencoder", "blocks": 4, "width": 6, "strided": [2], "residual": "none",
}  # fmt: skip
DENOISER = {"kind": "denoiser", "width": 4}
DDPM = {
    "kind": "ddpm", "width": 2, "steps": 20, "beta_start": 0.0001, "beta_end": 0.2,
    "centred": True, "norm_input": False,
}  # fmt: skip
GREY, COLOUR = (1, 8, 8), (3, 8, 8)
NAMES = ["a", "b"]


def draw(path: Path, height: int = 8, width: int = 8, **how: Any) -> Path:
    """Write a picture of random grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.random.default_rng(height).integers(0, 256, (height, width), dtype=np.uint8)
    Image.fromarray(grey).save(path, **how)
    return path


def read_png(path: Path) -> Tensor:
    """Return the pixels (1,C,H,W) of a PNG, in [0,1]."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        array = np.asarray(image)
    pixels = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.tensor(pixels).float()[None] / 255


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", AUTOENCODER, GREY, NAMES)


def purify(*words: str) -> int:
    return main(["purify", *words])


def clean(model: Path, *images: Path, out: Path, options: tuple[str, ...] = ()) -> int:
    return purify("--model", str(model), *map(str, images), "--out", str(out), *options)


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (64, 2)])
def test_a_file_is_written_as_the_purifier_returns_it(
    model: Path, tmp_path: Path, size: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    picture, out = draw(tmp_path / "in.bmp", *size), tmp_path / "new/out"
    assert clean(model, picture, out=out, options=("--side-by-side",)) == 0
    with Image.open(picture) as image:
        x = torch.tensor(np.asarray(image)).float()[None, None] / 255
    purified = load(model)(x)
    found = read_png(out / "in.png")
    assert found.shape == x.shape and not torch.equal(found, x)
    assert torch.equal(found, (purified * 255).round() / 255)
    both = read_png(out / SIDE_BY_SIDE / "in.png")
    gap = torch.ones(1, 1, size[0], GAP)
    assert torch.equal(both, torch.cat([x, gap, found], 3))
    error = (x - purified).square().mean().item()
    printed = capsys.readouterr().out
    assert f"1 images cleaned, mean reconstruction error {error:.3g}" in printed


def test_channels_are_those_of_the_model(tmp_path: Path) -> None:
    grey, colour = (
        write_model(tmp_path / "grey", AUTOENCODER, GREY, NAMES),
        write_model(tmp_path / "colour", AUTOENCODER, COLOUR, NAMES),
    )
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8))
    rgb.save(tmp_path / "in.png")  # With transparency, which is laid on white.
    assert clean(grey, tmp_path / "in.png", out=tmp_path / "out1") == 0
    assert clean(colour, tmp_path / "in.png", out=tmp_path / "out3") == 0
    assert read_png(tmp_path / "out1/in.png").shape == (1, 1, 8, 8)
    assert read_png(tmp_path / "out3/in.png").shape == (1, 3, 8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(tmp_path / "turned.jpg", 8, 16, exif=exif)
    assert clean(grey, tmp_path / "turned.jpg", out=tmp_path / "out1") == 0
    assert read_png(tmp_path / "out1/turned.png").shape == (1, 1, 16, 8)


def test_the_images_of_a_folder_are_cleaned_and_other_files_are_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = tmp_path / "in"
    for name in ("a.png", "b.JPG", "sub/c.png", ".hidden.png"):
        draw(inside / name)
    (inside / "text.png").write_text("x")
    (inside / "notes.txt").write_text("x")
    draw(inside / "odd.png", 9, 8)
    os.mkfifo(inside / "pipe.png")
    missing = tmp_path / "missing.png"
    # A file that is named and lies in the folder as well is cleaned once.
    assert clean(model, inside, inside / "a.png", missing, out=tmp_path / "out") == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]
    printed = capsys.readouterr()
    assert "2 images cleaned" in printed.out
    assert printed.err.splitlines() == [
        "error: 3 of 5 images could not be cleaned:",
        f"  {inside / 'odd.png'} is 9 x 8, but conv_autoencoder halves 1 times, which 9 x 8 images "
        "do not allow",
        f"  {inside / 'text.png'} is not one of PNG, JPEG, WEBP, BMP",
        f"  {missing} does not exist",
    ]


def test_neither_sources_nor_results_of_the_same_run_are_overwritten(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = draw(tmp_path / "a/x.png"), draw(tmp_path / "b/x.bmp", 10, 10)
    before = first.read_bytes()
    assert clean(model, first, second, out=tmp_path / "out") == 2
    assert "would both become" in capsys.readouterr().err
    photo = draw(tmp_path / "a/x.jpg")  # Its result would replace its neighbour.
    for out in (tmp_path / "a", tmp_path / "b/../a"):
        assert clean(model, photo, out=out) == 2
        assert "give another folder" in capsys.readouterr().err
    assert first.read_bytes() == before and not (tmp_path / "out").exists()
    assert clean(model, first, out=tmp_path / "out") == 0
    assert clean(model, second, out=tmp_path / "out") == 0
    assert read_png(tmp_path / "out/x.png").shape == (1, 1, 10, 10)


@pytest.mark.parametrize(
    ("network", "shape", "code", "sentence"),
    [
        (DDPM, GREY, 3, "holds a ddpm, which is no purifier by itself; --defense NAME takes"),
        ({"kind": "small_cnn", "width": 4}, GREY, 3, "holds a small_cnn, which is no purifier"),
        (DENOISER, (2, 8, 8), 3, "takes 2 channels, image files have 1 or 3"),
    ],
)
def test_models_that_cannot_clean_files_are_refused(
    network: dict[str, Any], shape: tuple[int, ...], code: int, sentence: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = write_model(tmp_path / "model", network, shape, NAMES)
    assert clean(folder, draw(tmp_path / "in.png"), out=tmp_path / "out") == code
    printed = capsys.readouterr().err
    assert sentence in printed and printed.count("\n") == 1


def test_a_command_that_cannot_be_carried_out_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    picture = draw(tmp_path / "in.png")
    for folder, images, out, code, sentence in (
        (model, tmp_path / "empty", tmp_path / "out", 2, "empty holds no file named .png, .jpg"),
        (model, picture, picture, 2, "is not a folder"),
        (tmp_path / "empty", picture, tmp_path / "out", 3, "is no finished model folder"),
        (model, picture, Path("/proc/nowhere"), 4, "No such file or directory: '/proc/nowhere'"),
    ):
        assert clean(folder, images, out=out) == code
        printed = capsys.readouterr().err
        assert sentence in printed and printed.count("\n") == 1


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose defenses diffpure and apudae have their networks."""
    folder = tmp_path / "project"
    folder.mkdir()
    project.write_params(folder, project.tiny())
    write_model(folder / "models/ddpm", DDPM, GREY, NAMES)
    write_model(folder / "models/denoiser", DENOISER, GREY, NAMES)
    monkeypatch.chdir(folder)
    return folder


def test_a_defense_takes_its_inference_from_the_parameters(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = draw(line / "in.png"), draw(line / "large.png", 16, 16)
    out = line / "out"
    assert purify("--defense", "apudae", str(small), str(large), "--out", str(out)) == 0
    descended = read_png(out / "in.png")
    assert clean(line / "models/denoiser", small, out=out) == 0
    assert not torch.equal(read_png(out / "in.png"), descended)
    assert purify("--defense", "diffpure", str(small), str(large), "--out", str(out)) == 3
    assert "large.png is 16 x 16, but this ddpm takes 8 x 8 alone" in capsys.readouterr().err
    assert purify("--defense", "absent", str(small), "--out", str(out)) == 2
    assert "has no defense absent; there are" in capsys.readouterr().err
    write_model(line / "models/ddpm", AUTOENCODER, GREY, NAMES)
    assert purify("--defense", "diffpure", str(small), "--out", str(out)) == 2
    assert "diffpure needs a ddpm" in capsys.readouterr().err


def test_images_of_other_sizes_are_cleaned_with_the_same_weights(line: Path) -> None:
    """APuDAE descends the same on an image of another size: each corner of a tiling alike."""
    tile = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(np.tile(tile, (2, 4))).save(line / "tiled.png")
    out = line / "out"
    assert purify("--defense", "apudae", str(line / "tiled.png"), "--out", str(out)) == 0
    found = read_png(out / "tiled.png")
    assert found.shape == (1, 1, 16, 32)
    assert torch.allclose(found[..., 8:16], found[..., 16:24], atol=0.02)


def test_an_image_too_large_for_the_memory_is_named(tmp_path: Path) -> None:
    wide = write_model(tmp_path / "wide", {**AUTOENCODER, "blocks": 2, "width": 1000}, GREY, NAMES)
    Image.new("L", (4000, 4000), 90).save(tmp_path / "huge.png")
    draw(tmp_path / "small.png")
    command = [
        sys.executable, "-m", "pipelines", "purify", "--model", str(wide),
        str(tmp_path / "huge.png"), str(tmp_path / "small.png"), "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    limited = 'ulimit -v 16000000 && exec "$0" "$@"'
    code, printed = project.run(project.ROOT, "bash", "-c", limited, *command)
    assert code == 3, printed
    assert "huge.png is 4000 x 4000, which failed:" in printed and "Traceback" not in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["small.png"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_whole_files_only(
    model: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    for index in range(3000):
        draw(tmp_path / f"in/{index}.png", 32, 32)
    process = project.start(
        project.ROOT, sys.executable, "-m", "pipelines", "purify", "--model", str(model),
        str(tmp_path / "in"), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "out/1000.png").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sent)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130, printed
    assert "interrupted; every file" in printed and "Traceback" not in printed
    made = list((tmp_path / "out").iterdir())
    assert 0 < len(made) < 3000
    for path in made:
        assert Image.open(io.BytesIO(path.read_bytes())).load() and path.suffix == ".png"
