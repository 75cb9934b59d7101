"""Fixtures that many tests share: a small trained classifier, test data, the finished line."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from made_once import made_once
from torch import nn

from components.attacks import Linf
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier, SmallCnn
from components.sources.digits import Digits
from components.training.classification import Classification
from components.training.contract import Frozen
from components.training.loop import Training, fit

torch.set_num_threads(1)
TRAINED = 1300
# Names a project made by `project.copy_to` in which `dvc repro` has run with the present code: work
# on a test of the line need not wait for the line each time.
LINE_ELSEWHERE = "LIMPID_TEST_LINE"
# Set to anything: tests that need a GPU run on the CPU, to show that they would run.
REHEARSAL = "LIMPID_GPU_REHEARSAL"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs a GPU where there is none."""
    wanted = item.get_closest_marker("gpu") and REHEARSAL not in os.environ
    if wanted and not torch.cuda.is_available():
        pytest.skip(f"torch sees no CUDA device; {REHEARSAL}=1 runs the test on the CPU")


@pytest.fixture
def gpu() -> torch.device:
    """The device of a test that is marked `gpu`."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    """The folder of a small model of MNIST and its images; see `authors`."""
    if not (test_data / "parity" / "model_and_images.safetensors").is_file():
        pytest.skip(f"{test_data} has no parity/model_and_images.safetensors")
    return test_data / "parity"


@pytest.fixture(autouse=True)
def _one_classifier(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that leaves the shared classifier trained, unfrozen or with gradients."""
    yield
    if "classifier" in request.fixturenames:
        model: nn.Module = request.getfixturevalue("classifier")
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Put the file with most tests of the line first, and its other files in the middle.

    One worker then makes the line while the others run what does not need it. At the end come small
    files, so that all workers end at about the same time.
    """
    waiting = Counter(item.path for item in items if "reproduced" in item.fixturenames)
    first = waiting.most_common(1)[0][0] if waiting else None
    place: dict[Path, float] = {}
    for index, item in enumerate(items):
        late = len(items) / 2 if item.path in waiting else index
        place.setdefault(item.path, -1 if item.path == first else late)
    items.sort(key=lambda item: place[item.path])


def _reproduce(home: Path) -> None:
    import project  # Here, because what it needs is not on every machine with a GPU.

    code, printed = project.run(
        project.copy_to(home / "project"), "dvc", "repro", **project.SECRETS
    )
    assert code == 0, printed[-4000:]
    (home / "printed.txt").write_text(printed)


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which `dvc repro` has run once; minutes."""
    if LINE_ELSEWHERE in os.environ:
        return Path(os.environ[LINE_ELSEWHERE])
    return made_once(tmp_path_factory, "line", _reproduce) / "project"
