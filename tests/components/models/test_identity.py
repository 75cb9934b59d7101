"""Weights and code identify a network; comments, docstrings and other networks' files do not."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from toy_networks import Blurred, Linear, Noisy, listening

from components.models import identity as identities
from components.models.classifiers import ResNet, SmallCnn
from components.models.defense import Defense, fold_batch_norm
from components.models.identity import (
    code_digest,
    identity,
    modules_of,
    sources,
    state_digest,
    stripped,
)
from components.models.purifiers.controls import GaussianNoise

NET = """from helper import scale

import torch


class Net(torch.nn.Module):
    def forward(self, x):
        return scale(x)
"""
HELPER = """def scale(x):
    return 2 * x
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network of a user's own and the module that it imports."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "helper.py").write_text(HELPER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def digest_of(name: str) -> str:
    """Import a network anew, as a new process does, and return the digest of its code."""
    for module in ("net", "helper"):
        sys.modules.pop(module, None)
    identities._digest_of.cache_clear()
    module: ModuleType = __import__(name)
    return code_digest(module.Net())


def test_state_digest_covers_buffers_and_names() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return SmallCnn(kind="small_cnn", width=4).build((1, 8, 8), 10)

    module = build()
    digest = state_digest(module)
    assert digest == state_digest(build())
    module.get_buffer("network.1.running_mean").add_(1e-6)
    assert state_digest(module) != digest
    one, other = nn.Module(), nn.Module()
    one.register_buffer("a", torch.ones(2))
    other.register_buffer("b", torch.ones(2))
    assert state_digest(one) != state_digest(other)


def test_code_digest_changes_with_code_and_not_with_words(own: Path) -> None:
    first = digest_of("net")
    (own / "net.py").write_text('"""A network."""\n# Why.\n\n\n' + NET)
    (own / "helper.py").write_text(HELPER.replace("2 * x", "2 * x  # twice"))
    assert digest_of("net") == first
    (own / "net.py").write_text(NET.replace("scale(x)", "scale(x) + 0"))
    assert digest_of("net") != first
    (own / "net.py").write_text(NET)
    (own / "helper.py").write_text(HELPER.replace("2 * x", "x + x"))
    assert digest_of("net") != first, "a module that the network imports"
    (own / "helper.py").write_text(HELPER)
    (own / "unrelated.py").write_text("print(1)")
    assert digest_of("net") == first


def test_code_is_what_the_parts_import_and_nothing_else() -> None:
    torch.manual_seed(0)
    classifier = SmallCnn(kind="small_cnn", width=4).build((1, 8, 8), 10)
    purifier = GaussianNoise(kind="gaussian_noise", sigma=0.1).build((1, 8, 8))
    names = {type(part).__module__ for part in Defense(classifier, purifier).modules()}
    found = set(sources(names))
    assert {
        "components.models.classifiers", "components.models.purifiers.controls",
        "components.models.purifiers.contract", "components.models.defense",
        "components.data.draws", "components.config",
    } <= found  # fmt: skip
    assert not any("gan" in name or "attacks" in name or "torch" in name for name in found)
    assert code_digest(classifier) != code_digest(Defense(classifier, purifier))


def test_no_attack_and_no_check_salts_the_noise_of_shared_toys() -> None:
    linear = Linear(torch.ones(2, 4), torch.zeros(2))
    judges = ("attacks", "probes", "checks", "evaluation", "selftest", "pipelines")
    for defense in (Defense(linear, Noisy()), listening(linear, lambda draws: None)):
        found = set(sources((*modules_of(defense), *identities.ALWAYS)))
        assert {"toy_networks", "components.models.purifiers.contract"} <= found
        assert not [name for name in found if not set(judges).isdisjoint(name.split("."))]


def test_strings_that_are_no_docstrings_belong_to_the_code() -> None:
    source = 'def f():\n    """Doc."""\n    return "# no comment"  # a comment\n'
    assert stripped(source) == 'def f():\n    return "# no comment"'
    assert stripped('x = """a\n\nb"""') != stripped('x = """a\n\nc"""')


def test_identity_covers_kinds_and_settings_and_copies_keep_it() -> None:
    torch.manual_seed(0)
    resnet = ResNet(kind="resnet", depth=8, width=4).build((1, 8, 8), 10)
    defense = Defense(resnet, Noisy()).freeze()
    assert defense.digest == identity(defense)
    assert fold_batch_norm(defense).digest == defense.digest
    assert Defense(resnet, Blurred()).freeze().digest != defense.digest
    assert Defense(resnet, Noisy(0.2)).freeze().digest != defense.digest, "another setting"
    assert Defense(resnet, Noisy()).freeze().digest == defense.digest
    assert Defense(resnet, Noisy()).digest == "", "weights in training change"
