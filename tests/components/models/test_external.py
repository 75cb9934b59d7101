"""Networks of a user's code: what is found out, what is stored, and the sentence for each fault."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from components.data.draws import Draws
from components.data.shards import DataError
from components.models import external
from components.models.checkpoints import ModelCard, fingerprint, load, read_card, save
from components.models.defense import Defense
from components.models.external import import_network, read_code, require_equal
from components.models.foreign import (
    ForeignClassifier,
    ForeignError,
    ForeignPurifier,
    resizing,
)
from components.models.identity import identity
from components.models.purifiers.contract import Purifier
from limpid.testing.check import grey_levels

SHAPE = (1, 8, 8)
X = grey_levels(12, SHAPE)
CLASSES = 3
PARTS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.linear = nn.Linear(64, classes)
    def forward(self, x):
        return self.linear(x.flatten(1))

class Noisy(nn.Module):
    def forward(self, x):
        return (x + 0.1 * torch.randn_like(x)).clamp(0, 1)

class Keyed(nn.Module):
    stochastic = True
    batchwise = False
    def forward(self, x, stream):
        return x.flatten(1)[:, :3] + stream.normal((3,), "logits").to(x)

class Rounded(nn.Module):
    def forward(self, x):
        return (4 * x).round() / 4
"""
MAKERS = """
import torch
from torch import nn
from components.models.preprocessing import preprocessed
from {parts} import Keyed, Net, Noisy, Rounded
def classifier(classes=3):
    return Net(classes)
def wrapped():
    return nn.DataParallel(Net(3))
def resizing():
    return preprocessed(Net(3), [0.5], [0.25], 8)
def drawn():
    net = Net(3)
    net.order = torch.randperm(64)
    net.forward = lambda x: net.linear(x.flatten(1)[:, net.order])
    return net
def keyed():
    return Keyed()
def noisy():
    return Noisy()
def rounded():
    return Rounded()
def number():
    return 7
def fails():
    raise RuntimeError("no such checkpoint")
class Box:
    a_value = 3
"""
OWN = """
from components.models.purifiers.jpeg import Jpeg
def jpeg():
    return Jpeg(kind="jpeg", quality=75).build((1, 8, 8))
"""


@pytest.fixture
def code(request: pytest.FixtureRequest) -> Mapping[str, bytes]:
    """Files of names that no other test imports: a process imports a name once."""
    mark = f"t{abs(hash(request.node.name)) % 10**9}"
    texts = {f"{mark}_parts.py": PARTS, f"{mark}.py": MAKERS.format(parts=f"{mark}_parts") + OWN}
    return {name: text.encode() for name, text in texts.items()}


def main_of(code: Mapping[str, bytes]) -> str:
    return min(code, key=len).removesuffix(".py")


def stored(folder: Path, code: Mapping[str, bytes], function: str, **arguments: object) -> Path:
    """Import a network and write its model folder."""
    torch.manual_seed(0)
    factory = f"{main_of(code)}:{function}"
    network, family, found = import_network(code, factory, arguments, None, X, CLASSES)
    names = [str(k) for k in range(CLASSES)]
    card = ModelCard(
        format=1, family=family, model=found.model_dump(mode="json"), shape=list(SHAPE),
        class_names=names, provenance={},
    )  # fmt: skip
    save(folder, network, card, code)
    return folder


def test_a_classifier_comes_back_with_its_weights(
    tmp_path: Path, code: Mapping[str, bytes]
) -> None:
    folder = stored(tmp_path / "net", code, "classifier")
    network = load(folder)
    assert isinstance(network, ForeignClassifier) and read_card(folder).family == "classifier"
    torch.manual_seed(0)
    linear = nn.Linear(64, CLASSES)
    assert torch.equal(network(X), linear(X.flatten(1)))


def test_a_network_inside_of_a_wrapper_is_the_network(
    tmp_path: Path, code: Mapping[str, bytes]
) -> None:
    wrapped, plain = (stored(tmp_path / n, code, n) for n in ("wrapped", "classifier"))
    assert torch.equal(load(wrapped)(X), load(plain)(X))


def test_a_network_that_resizes_comes_back_and_says_so(
    tmp_path: Path, code: Mapping[str, bytes]
) -> None:
    large = grey_levels(12, (1, 16, 16))
    factory = f"{main_of(code)}:resizing"
    network, family, found = import_network(code, factory, {}, None, large, CLASSES)
    card = ModelCard(
        format=1, family=family, model=found.model_dump(mode="json"), shape=[1, 16, 16],
        class_names=["0", "1", "2"], provenance={},
    )  # fmt: skip
    save(tmp_path / "net", network, card, code)
    again = load(tmp_path / "net")
    assert torch.equal(again(large), network(large))
    assert "resizes images of 16 x 16 to 8 x 8" in resizing(again)
    assert resizing(load(stored(tmp_path / "plain", code, "classifier"))) == ""


def test_a_function_that_makes_another_network_at_every_call_is_refused(
    tmp_path: Path, code: Mapping[str, bytes]
) -> None:
    network = import_network(code, f"{main_of(code)}:drawn", {}, None, X, CLASSES)[0]
    other = load(stored(tmp_path / "net", code, "drawn"))
    with pytest.raises(ForeignError, match="makes another network at every call"):
        require_equal(network, other, X)
    for name in ("classifier", "noisy", "keyed", "jpeg"):
        network = load(stored(tmp_path / name, code, name))
        require_equal(network, load(tmp_path / name), X)


def test_what_a_purifier_is_like_is_stored(tmp_path: Path, code: Mapping[str, bytes]) -> None:
    noisy, rounded = (load(stored(tmp_path / n, code, n)) for n in ("noisy", "rounded"))
    assert isinstance(noisy, ForeignPurifier) and isinstance(rounded, ForeignPurifier)
    assert noisy.stochastic and noisy.differentiable
    assert not rounded.stochastic and not rounded.differentiable
    draws = Draws(0, "attack", torch.arange(len(X))).stream("salt")
    assert torch.equal(noisy(X, draws), noisy(X, draws))
    # A classifier of keyed noise, and a Purifier of Limpid, keep what they declare.
    keyed = Defense(load(stored(tmp_path / "keyed", code, "keyed")), None).freeze()
    assert keyed.stochastic and not keyed.batchwise
    one = Draws(0, "attack", torch.arange(len(X)))
    assert torch.equal(keyed(X, one), keyed(X, one))
    assert not torch.equal(keyed(X, one), keyed(X, one.redraw(1)))
    own = load(stored(tmp_path / "own", code, "jpeg"))
    assert isinstance(own, Purifier) and own.stand_ins


def test_another_process_builds_it_again_with_the_same_identity(
    tmp_path: Path, code: Mapping[str, bytes]
) -> None:
    folder = stored(tmp_path / "net", code, "classifier")
    script = (
        "import sys; from components.models.checkpoints import load\n"
        "from components.models.defense import Defense\n"
        "print(Defense(load(sys.argv[1]), None).freeze().digest, end='')"
    )
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == Defense(load(folder), None).freeze().digest
    # Nothing was written beside the code: the manifest still holds.
    assert fingerprint(folder)


def test_changed_code_is_another_identity(tmp_path: Path, code: Mapping[str, bytes]) -> None:
    before = identity(load(stored(tmp_path / "net", code, "classifier")))
    name = max(code, key=len)
    changed = {"changed_" + n: text for n, text in code.items()}
    main = "changed_" + min(code, key=len)
    changed[main] = code[min(code, key=len)].replace(
        name.removesuffix(".py").encode(), f"changed_{name}".removesuffix(".py").encode()
    )
    changed["changed_" + name] = code[name].replace(b"x.flatten(1)", b"2 * x.flatten(1)")
    assert identity(load(stored(tmp_path / "other", changed, "classifier"))) != before


def test_altered_code_in_a_model_folder_is_refused(
    tmp_path: Path, code: Mapping[str, bytes]
) -> None:
    folder = stored(tmp_path / "net", code, "classifier")
    path = folder / "code" / min(code, key=len)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(DataError, match="was altered since it was written"):
        load(folder)
    path.write_bytes(code[path.name])
    (folder / "code" / "more.py").write_text("x = 1")
    with pytest.raises(DataError, match="and only these"):
        load(folder)


def test_a_folder_of_code_is_read_without_hidden_files(tmp_path: Path) -> None:
    for name in ("a.py", "package/__init__.py", "package/b.py", ".hidden/c.py", "notes.txt"):
        path = tmp_path / ".above" / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1")
    found = read_code(tmp_path / ".above" / "code")
    assert sorted(found) == ["a.py", "package/__init__.py", "package/b.py"]
    assert list(read_code(tmp_path / ".above" / "code" / "a.py")) == ["a.py"]
    package = read_code(tmp_path / ".above" / "code" / "package")
    assert sorted(package) == ["package/__init__.py", "package/b.py"]


def test_weights_are_those_of_the_file(tmp_path: Path, code: Mapping[str, bytes]) -> None:
    linear = nn.Linear(64, CLASSES)
    path = tmp_path / "weights.safetensors"
    save_file({f"linear.{n}": t for n, t in linear.state_dict().items()}, path)
    network, _, _ = import_network(code, f"{main_of(code)}:classifier", {}, path, X, CLASSES)
    assert torch.equal(network(X), linear(X.flatten(1)))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("number", "returns a int; it must return a torch.nn.Module"),
        ("fails", "fails with the arguments {}: no such checkpoint"),
        ("nothing", "has no function nothing; name module:function"),
    ],
)
def test_a_factory_that_makes_no_network_ends_in_one_sentence(
    code: Mapping[str, bytes], function: str, said: str
) -> None:
    with pytest.raises(ForeignError, match=re.escape(said)) as caught:
        import_network(code, f"{main_of(code)}:{function}", {}, None, X, CLASSES)
    assert "\n" not in str(caught.value)


def sentence(code: Mapping[str, bytes], factory: str, weights: Path | None = None) -> str:
    with pytest.raises(ForeignError) as caught:
        import_network(code, factory, {}, weights, X, CLASSES)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_code_that_cannot_be_imported_ends_in_one_sentence(code: Mapping[str, bytes]) -> None:
    assert "the code has no module absent; it has t" in sentence(code, "absent:make")
    broken = {"broken_code_of_a_test.py": b"import no_such_package"}
    said = sentence(broken, "broken_code_of_a_test:make")
    assert "cannot be imported: No module named 'no_such_package'" in said
    assert "invalid syntax" in sentence({"odd_code_of_a_test.py": b"x ="}, "odd_code_of_a_test:m")


def test_files_beside_the_code_are_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_the_code.py").write_text("x = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    late = (
        b"from torch import nn\ndef make():\n    import beside_the_code\n    return nn.Identity()"
    )
    said = sentence({"reaches_beside.py": late}, "reaches_beside:make")
    assert "imports beside_the_code from" in said and "which is not one of its files" in said


def test_the_copies_of_the_code_may_lie_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is where somebody works in the folder for temporary files."""
    monkeypatch.setattr(external, "_unpacked_in", lambda: tmp_path / "copies")
    monkeypatch.chdir(tmp_path)
    files = {"works_in_tmp.py": b"from torch import nn\ndef make():\n    return nn.Identity()"}
    _, family, _ = import_network(files, "works_in_tmp:make", {}, None, X, CLASSES)
    assert family == "purifier"


def test_a_name_that_is_taken_is_refused(code: Mapping[str, bytes]) -> None:
    main = main_of(code)
    import_network(code, f"{main}:classifier", {}, None, X, CLASSES)
    other = {**code, f"{main}.py": code[f"{main}.py"] + b"x = 1"}
    assert "two networks have different code called" in sentence(other, f"{main}:classifier")
    for name in ("torch", "random", "components"):
        assert "also the name of a module of" in sentence({f"{name}.py": b"x = 1"}, f"{name}:m")


def test_weights_that_do_not_fit_end_in_one_sentence(
    tmp_path: Path, code: Mapping[str, bytes]
) -> None:
    factory, path = f"{main_of(code)}:classifier", tmp_path / "weights.safetensors"
    right = {"linear.weight": torch.zeros(3, 64), "linear.bias": torch.zeros(3)}
    save_file({"linear.weight": right["linear.weight"]}, path)
    assert "lacks linear.bias, which the network has" in sentence(code, factory, path)
    save_file({**right, "more": torch.zeros(1)}, path)
    assert "has more, which the network has not" in sentence(code, factory, path)
    save_file({**right, "linear.bias": torch.zeros(4)}, path)
    assert "size mismatch for linear.bias" in sentence(code, factory, path)


def test_other_classes_are_refused(code: Mapping[str, bytes]) -> None:
    with pytest.raises(ForeignError, match="has 5 classes, and the images have 3"):
        import_network(code, f"{main_of(code)}:classifier", {"classes": 5}, None, X, CLASSES)


def test_the_code_of_a_card_has_to_be_the_code_that_was_imported(
    code: Mapping[str, bytes],
) -> None:
    _, family, found = import_network(code, f"{main_of(code)}:noisy", {}, None, X, CLASSES)
    other = {name: text + b"\n" for name, text in code.items()}
    with pytest.raises(ForeignError, match="is not the code that was imported"):
        found.build(other, family)
    assert external.digest_of(code) != external.digest_of(other)
