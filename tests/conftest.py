"""What the component tests share: one thread, a small trained classifier, where test data lie."""

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import project
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toys import ParityModel

from components.attacks import Linf
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier, SmallCnn
from components.models.defense import Defense
from components.sources.digits import Digits
from components.training.classification import Classification
from components.training.contract import Frozen
from components.training.loop import Training, fit

torch.set_num_threads(1)
TRAINED = 1300
# A project made by `project.copy_to`, in which `dvc repro` has run with the code of now, for one
# who works on a test of the line and does not want to wait for it each time.
LINE_ELSEWHERE = "LIMPID_TEST_LINE"
HOME = "LIMPID_TEST_HOME"


@pytest.fixture(autouse=True)
def _own_random_stream() -> Iterator[None]:
    """Give every test the same global random stream, whatever ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def digits() -> ImageSet:
    """All 1,797 digits of scikit-learn, in a fixed random order; ids are not row numbers."""
    limits = {"val": 1, "test": 1, "train_limit": None, "test_limit": None}
    raw = Digits(kind="digits", max_reject_fraction=0.0, **limits).load(Path("unused"))
    order = torch.randperm(len(raw.train.labels), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(raw.train.images)[order]
    labels = torch.from_numpy(raw.train.labels)[order]
    return ImageSet(images, labels, 7 * order + 3, raw.class_names)


@pytest.fixture(scope="session")
def train_set(digits: ImageSet) -> ImageSet:
    """The digits the classifier was trained on."""
    return digits[torch.arange(TRAINED)]


@pytest.fixture(scope="session")
def test_set(digits: ImageSet) -> ImageSet:
    """The digits the classifier never saw."""
    return digits[torch.arange(TRAINED, len(digits))]


@pytest.fixture(scope="session")
def classifier(train_set: ImageSet) -> Classifier:
    """A classifier of digits, standard-trained, frozen, in eval mode; no test may change it."""
    torch.manual_seed(0)
    model = SmallCnn(kind="small_cnn", width=8).build(train_set.shape, 10)
    model.normalise_by(train_set.pixels())
    objective = Classification(kind="classification").bind(
        Frozen(None, (), Linf(norm="linf", eps_255=8.0))
    )
    config = Training(
        epochs=6,
        batch_size=50,
        optimiser="adam",
        learning_rate=0.01,
        weight_decay=0.0,
        schedule="one_cycle",
        augmentation="none",
        precision="float32",
    )
    nothing: dict[str, float] = {}
    for _ in fit(model, objective, train_set, None, config, 0, lambda *_: nothing, None):
        pass
    model.eval().requires_grad_(False).zero_grad(set_to_none=True)
    return model


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of recorded outcomes and data sets that no checkout carries."""
    root = os.environ.get("LIMPID_TEST_DATA")
    if not root:
        pytest.skip("LIMPID_TEST_DATA does not name the folder of test data")
    return Path(root)


@pytest.fixture(scope="session")
def parity(test_data: Path) -> Path:
    """What the authors' AutoAttack did to a fixed small model."""
    if not (test_data / "parity" / "outcomes.json").is_file():
        pytest.skip(f"{test_data} has no parity/outcomes.json")
    return test_data / "parity"


@pytest.fixture(scope="session")
def recorded(parity: Path) -> tuple[Defense, ImageSet, dict[str, Any]]:
    """The recorded model, its images, and by threat and attack what the authors' code did to it."""
    tensors = load_file(parity / "model_and_images.safetensors")
    images, labels = tensors.pop("images"), tensors.pop("labels").long()
    model = ParityModel()
    model.load_state_dict(tensors)
    data = ImageSet(images, labels, torch.arange(len(labels)), tuple("0123456789"))
    outcomes: dict[str, Any] = json.loads((parity / "outcomes.json").read_text())["threat"]
    return Defense(model, None).freeze(), data, outcomes


@pytest.fixture(autouse=True)
def _one_classifier(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that leaves the shared classifier trained, unfrozen or with gradients."""
    yield
    if "classifier" in request.fixturenames:
        model: nn.Module = request.getfixturevalue("classifier")
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def pytest_configure(config: pytest.Config) -> None:
    """Make the home of the line that all processes of this run share."""
    if not hasattr(config, "workerinput"):
        os.environ[HOME] = tempfile.mkdtemp(prefix="limpid-line-")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what waits for the line after all else, that it may run beside it."""
    items.sort(key=lambda item: "reproduced" in getattr(item, "fixturenames", ()))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin `dvc repro` where a test wants its result: it takes minutes, beside the first tests."""
    first = getattr(session.config, "workerinput", {"workerid": "gw0"})["workerid"] == "gw0"
    wanted = any("reproduced" in getattr(item, "fixturenames", ()) for item in session.items)
    if not (first and wanted) or session.config.option.collectonly or LINE_ELSEWHERE in os.environ:
        return
    home = Path(os.environ[HOME])
    folder = project.copy_to(home / "project")
    told = "dvc repro > ../printed.txt 2>&1; echo $? > ../code.part; mv ../code.part ../code"
    (home / "printed.txt").touch()
    line = project.start(folder, "sh", "-c", told, **project.SECRETS)
    (home / "pid").write_text(str(line.pid))


def pytest_unconfigure(config: pytest.Config) -> None:
    """End what is left of the line, and leave nothing behind."""
    if not hasattr(config, "workerinput"):
        home = Path(os.environ.pop(HOME))
        if (home / "pid").exists() and not (home / "code").exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int((home / "pid").read_text()), signal.SIGKILL)
                # Else what is dying may yet write into what is being removed.
                time.sleep(1)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def reproduced() -> Path:
    """A project in which `dvc repro` has run once."""
    if LINE_ELSEWHERE in os.environ:
        return Path(os.environ[LINE_ELSEWHERE])
    home, ends = Path(os.environ[HOME]), time.monotonic() + 900
    while not (home / "code").exists():
        assert time.monotonic() < ends, (home / "printed.txt").read_text()[-4000:]
        time.sleep(0.2)
    assert (home / "code").read_text().strip() == "0", (home / "printed.txt").read_text()[-4000:]
    return home / "project"
