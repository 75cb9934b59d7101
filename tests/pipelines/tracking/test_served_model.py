"""A served defense answers bit for bit as it was scored; a bad request gets one sentence."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from cluster.local_cluster import free_port
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import predictions_to_json
from project import ROOT
from pydantic import TypeAdapter
from ruamel.yaml import YAML
from torch import Tensor
from toys import write_model

import components
from components import serving
from components.data.draws import Draws, NoiseStream
from components.models import identity as identities
from components.models.checkpoints import fingerprint, load, read_card, save
from components.models.defense import Defense
from components.models.purifiers import InferenceConfig, Purifier
from pipelines.tasks.subject import Subject
from pipelines.tracking import registry
from pipelines.tracking.registry import Registration
from pipelines.tracking.served_model import (
    BATCH,
    MAX_IMAGES,
    ServedDefense,
    ServingError,
    read_request,
)
from pipelines.tracking.tracker import Tracker

SHAPE, NAMES = (1, 8, 8), [f"digit {label}" for label in range(10)]
NAME, SEED = "limpid-tiny", 7
AUTOENCODER = {
    "kind": "conv_autoencoder", "blocks": 4, "width": 6, "strided": [2], "residual": "none",
}  # fmt: skip
RT2 = {"kind": "rt2", "patch": 2, "missing": 0.25, "sigma": 0.1}
DENOISER = {"kind": "denoiser", "width": 4}
DDPM = {
    "kind": "ddpm", "width": 2, "steps": 10, "beta_start": 0.0001, "beta_end": 0.2,
    "centred": False, "norm_input": True,
}  # fmt: skip
APUDAE = {
    "kind": "apudae", "steps": 3, "rate": 0.02, "optimiser": "adam", "target": "minimum",
    "scaled": False, "noise_255": 0.0, "transform": None,
}  # fmt: skip
DIFFDEFENSE = {
    "kind": "diffdefense", "mode": "released", "iterations": 2, "restarts": 2, "steps": 3,
    "rate": 25.0,
}  # fmt: skip
# name -> (network, inference); the second is random, the last three have detectors of their own.
DEFENSES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "koo": (AUTOENCODER, None),
    "atop": ({"kind": "random_transform", "transform": RT2, "inner": AUTOENCODER}, None),
    "denoiser": (DENOISER, None),
    "apudae": (DENOISER, APUDAE),
    "diffdefense": (DDPM, DIFFDEFENSE),
}
EVERY = pytest.mark.parametrize("name", DEFENSES)


def byte_pixels(count: int = 12) -> Tensor:
    """Images whose pixels are those of bytes, as the images of a test set are."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, *SHAPE), generator=generator).float() / 255


def subject(folder: Path, name: str) -> Subject:
    inference = DEFENSES[name][1]
    return Subject(
        folder / "classifier",
        folder / name,
        inference=TypeAdapter(InferenceConfig).validate_python(inference) if inference else None,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of models, all defenses of which are registered in a store of their own."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "components").symlink_to(ROOT / "components")
    write_model(folder / "classifier", {"kind": "small_cnn", "width": 4}, SHAPE, NAMES)
    for name, (network, _) in DEFENSES.items():
        write_model(folder / name, network, SHAPE, NAMES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        # Loading a model puts its code in front of everything else.
        patch.setattr(sys, "path", list(sys.path))
        tracker = Tracker("evaluate", "limpid-tiny", {}, "key")
        tracker.finish("FINISHED", [registration(folder, name) for name in DEFENSES])
        tracker.thread.join()
        assert not tracker.problem
        registry.connect()
        yield folder
        mlflow.set_tracking_uri(None)


def registration(folder: Path, name: str) -> Registration:
    return Registration(
        name=name,
        version_of=NAME,
        fingerprint=f"{name}:{fingerprint(folder / name)}",
        digest=subject(folder, name).defense().digest,
        folders={"classifier": folder / "classifier", "purifier": folder / name},
        inference=DEFENSES[name][1],
        metrics={"headline": 0.5},
        tags={
            "defense": name,
            "verdict": "above adversarial training",
            "measurement valid": "yes",
            "blocking_failed": "",
            "limpid.candidate": "yes" if name == "atop" else "no",
        },
        description=name,
    )


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Any]:
    versions = mlflow.MlflowClient().search_model_versions(f"name = '{NAME}'")
    uris = {v.tags["defense"]: f"models:/{NAME}/{v.version}" for v in versions}
    return {name: mlflow.pyfunc.load_model(uris[name]) for name in DEFENSES}


@EVERY
def test_the_served_defense_is_the_one_that_is_scored(
    folder: Path, models: dict[str, Any], name: str
) -> None:
    x = byte_pixels()
    found = models[name].predict({"images": x.numpy(), "seed": SEED})
    scored, draws = subject(folder, name).defense(), Draws(SEED, "score", torch.arange(len(x)))
    with torch.no_grad():
        purified, logits = scored.purify(x, draws), scored(x, draws)
        score = scored.detector_score(x, draws)
    assert not torch.equal(purified, x)
    assert found["purified"].tobytes() == purified.numpy().tobytes()
    assert found["logits"].tobytes() == logits.numpy().tobytes()
    assert found["attack_score"].tobytes() == score.numpy().tobytes()
    error = ((x - purified) ** 2).mean((1, 2, 3))
    assert np.allclose(found["reconstruction_error"], error, rtol=1e-5)
    assert list(found["label"]) == [NAMES[int(best)] for best in logits.argmax(1)]


def resigned(folder: Path, **changes: Any) -> None:
    """Change the card of a model folder, and its manifest with it."""
    card = read_card(folder)
    save(folder, load(folder), card.model_copy(update=changes))


def rewritten(home: Path, **config: Any) -> None:
    """Change what the registered model says of itself."""
    yaml = YAML()
    about = yaml.load(home / "MLmodel")
    known = about["flavors"]["python_function"]["config"]
    for key, value in config.items():
        (known["scored"] if key in known["scored"] else known)[key] = value
    yaml.dump(about, home / "MLmodel")


def appended(path: Path) -> None:
    path.write_text(path.read_text() + "\nUNSCORED = True\n")


EDITS: dict[str, Callable[[Path], None]] = {
    "class names": lambda home: resigned(home / "artifacts/classifier", class_names=NAMES[::-1]),
    "the purifier's card": lambda home: resigned(home / "artifacts/koo", provenance={"by": "me"}),
    "served_model.py": lambda home: appended(home / "served_model.py"),
    "serving.py": lambda home: appended(home / "code/components/serving.py"),
    "verdict": lambda home: rewritten(home, verdict="far above adversarial training"),
    "figures": lambda home: rewritten(home, figures={"headline": 0.9}),
    "digest": lambda home: rewritten(home, digest="0" * 64),
}


@pytest.fixture
def home(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a registered model, from which everything in it is loaded."""
    versions = mlflow.MlflowClient().search_model_versions(f"name = '{NAME}'")
    (source,) = (version.source for version in versions if version.tags["defense"] == "koo")
    home = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(tmp_path)))
    monkeypatch.setattr(components, "__file__", str(home / "code/components/__init__.py"))
    return home


def test_the_served_defense_carries_its_digest_and_verdict(home: Path) -> None:
    served = mlflow.pyfunc.load_model(str(home)).unwrap_python_model()
    assert served.digest == served.defense.digest
    assert served.verdict == "above adversarial training" and served.failed == []


@pytest.mark.parametrize("edit", EDITS)
def test_what_was_edited_since_it_was_registered_is_not_served(home: Path, edit: str) -> None:
    EDITS[edit](home)
    with pytest.raises(MlflowException, match=r"^this is not what was registered: its model .*\)$"):
        mlflow.pyfunc.load_model(str(home))


def test_what_does_not_say_what_was_scored_is_not_served(home: Path) -> None:
    rewritten(home, seal="")
    with pytest.raises(MlflowException, match="register it by `limpid promote --sync`"):
        mlflow.pyfunc.load_model(str(home))


def test_other_code_than_was_scored_is_not_served(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identities, "_digest_of", lambda names: "changed")
    with pytest.raises(MlflowException, match=r"^this is not the defense that was scored: .*\)$"):
        mlflow.pyfunc.load_model(str(home))


def test_loading_says_that_a_measurement_is_not_valid(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client, one = registry.connect(), registration(folder, "denoiser")
    tags = {**one.tags, "measurement valid": "no", "blocking_failed": "blind_attack, planted"}
    tracker = Tracker("evaluate", "limpid-tiny", {}, "key")
    bound = replace(one, version_of="limpid-bound", tags=tags)
    assert not tracker.finish("FINISHED", [bound])
    (version,) = client.search_model_versions("name = 'limpid-bound'")
    served = mlflow.pyfunc.load_model(version.source).unwrap_python_model()
    assert served.failed == ["blind_attack", "planted"]
    assert "not valid, failed checks: blind_attack, planted" in caplog.text


def test_a_version_requires_the_libraries_that_scored_it(home: Path) -> None:
    required = (home / "requirements.txt").read_text().split()
    for name in ("torch", "numpy", "safetensors"):
        assert f"{name}=={version(name).partition('+')[0]}" in required


def test_answers_are_in_full_precision_whatever_the_caller_has_on(folder: Path) -> None:
    defense, x = subject(folder, "koo").defense(), byte_pixels()
    expected = serving.predict(defense, x, SEED, BATCH).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = serving.predict(defense, x, SEED, BATCH).logits
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@EVERY
def test_noise_is_fresh_unless_a_request_has_a_seed(models: dict[str, Any], name: str) -> None:
    x = byte_pixels().numpy()
    answers = [models[name].predict(x)["purified"] for _ in range(2)]
    assert np.array_equal(*answers) == (name not in ("atop", "diffdefense"))
    keyed = [models[name].predict({"images": x, "seed": 3})["purified"] for _ in range(2)]
    assert np.array_equal(*keyed)


def test_large_requests_are_answered_in_batches(folder: Path, models: dict[str, Any]) -> None:
    x = byte_pixels(BATCH + 30)
    found = models["atop"].predict({"images": x.numpy(), "seed": SEED})["logits"]
    scored = subject(folder, "atop").defense()
    with torch.no_grad():
        whole = scored(x, Draws(SEED, "score", torch.arange(len(x)))).numpy()
        first = scored(x[:BATCH], Draws(SEED, "score", torch.arange(BATCH))).numpy()
    assert found[:BATCH].tobytes() == first.tobytes()
    assert np.allclose(found, whole, atol=1e-5)


class Counting(Purifier):
    """Changes images by noise, and counts how often."""

    stochastic = True
    purified = 0

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        self.purified += 1
        assert stream is not None
        return (x + stream.normal(tuple(x.shape[1:]), "grain")).clamp(0, 1)


def test_an_image_is_purified_once_if_its_detector_score_needs_no_more(folder: Path) -> None:
    purifier, x = Counting(), byte_pixels()
    defense = Defense(subject(folder, "koo").defense().classifier, purifier).freeze()
    found = serving.predict(defense, x, SEED, 5)
    assert purifier.purified == 3, "one purification for each batch of at most five"
    draws = Draws(SEED, "score", torch.arange(len(x)))
    assert torch.equal(found.detector_score, defense.detector_score(x, draws))
    assert found.detector_score.unique().numel() > 1


class FailingPurifier(Purifier):
    """Makes the first image nothing; can fail altogether."""

    fails = False

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        if self.fails:
            raise RuntimeError("not enough memory: secret")
        return torch.cat([x[:1] * float("nan"), x[1:]])


@pytest.fixture
def failing(folder: Path) -> ServedDefense:
    served = ServedDefense()
    served.defense = Defense(
        subject(folder, "koo").defense().classifier, FailingPurifier()
    ).freeze()
    served.shape, served.class_names = SHAPE, NAMES
    return served


def test_values_that_are_not_finite_become_null(failing: ServedDefense) -> None:
    text = StringIO()
    predictions_to_json(failing.predict(None, byte_pixels(3).numpy()), text)
    found = json.loads(text.getvalue(), parse_constant=pytest.fail)["predictions"]
    assert found["label"][0] is None and found["label"][1] in NAMES
    assert found["logits"][0] == [None] * 10 and None not in found["logits"][1]
    assert found["attack_score"][0] is None and found["attack_score"][1] == 0.0
    assert found["purified"][0] == [[[None] * 8] * 8]
    assert np.array_equal(np.array(found["purified"][1:], np.float32), byte_pixels(3)[1:])


def test_a_failing_defense_answers_500_without_details(failing: ServedDefense) -> None:
    failing.defense.purifier.fails = True
    with pytest.raises(ServingError, match=r"^the defense failed .* \(RuntimeError\)$") as caught:
        failing.predict(None, byte_pixels().numpy())
    assert caught.value.get_http_status_code() == 500
    assert "secret" not in caught.value.serialize_as_json()


def as_bytes(x: Tensor) -> Any:
    return (x * 255).round().numpy().astype(np.uint8)


@pytest.mark.parametrize(
    "request_",
    [
        byte_pixels().numpy(),
        byte_pixels().numpy().astype(np.float64),
        as_bytes(byte_pixels()),
        as_bytes(byte_pixels()).astype(np.int64),
        as_bytes(byte_pixels()).tolist(),
        {"images": byte_pixels().tolist()},
        {"images": as_bytes(byte_pixels()).astype(np.float32), "white": 255},
        {"images": byte_pixels().numpy(), "white": 1},
    ],
)
def test_fractions_and_bytes_are_distinguished(request_: Any) -> None:
    x, seed = read_request(request_, SHAPE)
    assert x.dtype == torch.float32 and torch.equal(x, byte_pixels()) and seed is None


def test_images_of_zeros_and_ones_need_a_white_value() -> None:
    board = (torch.arange(64).view(1, *SHAPE) % 2).numpy()
    with pytest.raises(ServingError, match='say "white": 1 or "white": 255'):
        read_request(board, SHAPE)
    for white, brightest in ((1, 1.0), (255, 1 / 255)):
        x, _ = read_request({"images": board, "white": white}, SHAPE)
        assert x.max().item() == pytest.approx(brightest) and x.min() == 0
    # Where there is a type there is no doubt.
    assert read_request(board.astype(np.float32), SHAPE)[0].max() == 1
    assert read_request(board.astype(np.uint8), SHAPE)[0].max() == pytest.approx(1 / 255)


@pytest.mark.parametrize("seed", [-1, 0.5, True, "7", [1, 2], None, 2**70])
def test_a_seed_must_be_one_whole_number(seed: Any) -> None:
    request_ = {"images": byte_pixels().numpy(), "seed": seed}
    if seed is None:
        assert read_request(request_, SHAPE)[1] is None
    else:
        with pytest.raises(ServingError, match="seed must be"):
            read_request(request_, SHAPE)


class Pickled(mlflow.pyfunc.PythonModel):
    """Leaves a mark where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))

    def predict(self, context: Any, model_input: list[str]) -> list[str]:
        return model_input


def test_a_pickled_model_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, marker = tmp_path / "model", tmp_path / "marker"
    mlflow.pyfunc.save_model(model, python_model=Pickled(marker), pip_requirements=[])
    with pytest.raises(mlflow.MlflowException, match="using pickle is disallowed"):
        mlflow.pyfunc.load_model(str(model))
    assert not marker.exists()
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    with pytest.raises(Exception):  # noqa: B017, PT011
        mlflow.pyfunc.load_model(str(model))
    assert marker.exists(), "it was not what it is taken for"


def test_commands_in_the_docs_refuse_pickled_models() -> None:
    for page in ("README.md", "docs/serving.md"):
        blocks = (ROOT / page).read_text().split("```")[1::2]
        serving = [block for block in blocks if "mlflow models serve" in block]
        assert serving, page
        assert all("MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false" in block for block in serving), page


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The address of a real server of the champion, which is random."""
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias(NAME, "candidate").version
    client.set_registered_model_alias(NAME, "champion", version)
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{NAME}@champion",
        "--env-manager", "local", "--port", str(port),
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Served from anywhere, with the code it was registered with.
    (folder / "elsewhere").mkdir()
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder / "elsewhere", stdout=log, stderr=log,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not answers(port):
                assert process.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < deadline, (folder / "server.log").read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            process.terminate()
            process.wait(timeout=30)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5) as answered:
            return bool(answered.status == 200)
    except OSError:
        return False


def post(url: str, body: Any, kind: str = "application/json") -> tuple[int, str]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = urllib.request.Request(url, content, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(sent, timeout=60) as answered:
            return answered.status, answered.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_answers_over_http_equal_the_scored_defense(folder: Path, server: str) -> None:
    x = byte_pixels()
    scored, draws = subject(folder, "atop").defense(), Draws(SEED, "score", torch.arange(len(x)))
    with torch.no_grad():
        purified, logits = scored.purify(x, draws), scored(x, draws)
    for images in (x.tolist(), as_bytes(x).tolist()):
        for key, row in (("inputs", {"images": images, "seed": SEED}), ("instances", images)):
            code, body = post(server, {key: row})
            assert code == 200, body
            found = json.loads(body, parse_constant=pytest.fail)["predictions"]
            same = np.array(found["purified"], np.float32).tobytes() == purified.numpy().tobytes()
            assert same == (key == "inputs"), "without a seed noise is fresh"
            assert len(found["label"]) == len(found["reconstruction_error"]) == len(x)
            if key == "inputs":
                assert np.array_equal(np.array(found["logits"], np.float32), logits)


GOOD = byte_pixels(2).tolist()


def planted(value: Any) -> list[Any]:
    """Two good images, but for one pixel."""
    images = byte_pixels(2).tolist()
    images[1][0][3][4] = value
    return images


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (
            byte_pixels(1)[0].tolist(),
            "must be of shape (N, 1, 8, 8) with N from 1 to 10000, not (1, 8",
        ),
        (byte_pixels(2)[:, :, 1:].tolist(), "not (2, 1, 7, 8)"),
        ([], "not (0,)"),
        ([[[[0.5] * 8] * 8]] * (MAX_IMAGES + 1), "not (10001, 1, 8, 8)"),
        (planted(float("nan")), "these pixels go from nan to nan"),
        (planted(float("inf")), "to inf, but fractions must lie in [0, 1]"),
        (planted(1.5), "to 1.5, but"),
        (planted(-0.1), "go from -0.1"),
        (as_bytes(byte_pixels(2)).astype(int).clip(0, 1).tolist(), "may be fractions or bytes"),
        ((as_bytes(byte_pixels(2)).astype(int) + 1).tolist(), "to 256, but"),
        (planted(None), "images must be numbers"),
        (planted("white"), "images must be numbers"),
        ("hello", "images must be numbers"),
        ([{"image": 1}], "images must be numbers"),
        ({"pixels": GOOD}, "this has pixels"),
        ({"images": GOOD, "sead": 1}, "this has sead"),
        ({"seed": 1}, "this lacks images"),
        ({"images": GOOD, "seed": "one"}, "seed must be numbers"),
        ({"images": GOOD, "seed": [1, 2]}, "seed must be one whole number"),
        ({"images": GOOD, "white": 127}, "1 or 255, not 127"),
    ],
)
def test_a_bad_request_gets_one_sentence(server: str, inputs: Any, sentence: str) -> None:
    code, body = post(server, {"inputs": inputs})
    answered = json.loads(body)
    assert code == 400, body
    assert set(answered) == {"error_code", "message"}
    assert sentence in answered["message"]
    assert "\n" not in answered["message"] and len(answered["message"]) < 200


@pytest.mark.parametrize(
    ("body", "kind", "expected"),
    [
        (b"{", "application/json", 400),
        (b"\xff", "application/json", 400),
        ({"images": GOOD}, "application/json", 400),
        ({"inputs": [[[[0.5]], [[0.5, 0.5]]]]}, "application/json", 400),
        ({"inputs": GOOD, "instances": GOOD}, "application/json", 400),
        ({"dataframe_split": {"columns": ["a"], "data": [[1.5]]}}, "application/json", 400),
        (b"a,b\n1.5,2.5\n", "text/csv", 400),
        (b"x", "image/png", 415),
    ],
)
def test_requests_that_mlflow_refuses_get_an_error_code_and_no_traceback(
    server: str, body: Any, kind: str, expected: int
) -> None:
    code, answered = post(server, body, kind)
    assert code == expected
    assert not re.search(r'Traceback|\.py"', answered), answered
