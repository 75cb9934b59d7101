"""A plugin adds kinds, sections name its code, and each of its faults is one sentence."""

import importlib
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from components import plugins
from components.data.shards import DataError
from components.models import identity as identities
from components.models import purifiers
from components.models.checkpoints import ModelCard, load, read_section, save
from components.models.identity import code_digest
from components.models.purifiers.contract import Inference, PurifierSection
from components.models.purifiers.controls import Identity, Median
from components.plugins import PluginError, is_plugin, members, package_of

SECTION = """
from typing import Literal

import torch

from components.config import Config
from components.models.purifiers.contract import Inference, Purifier, PurifierSection


class Grey(PurifierSection):
    kind: Literal["grey"]

    def build(self, shape):
        return Half()


class Half(Purifier):
    def __init__(self):
        super().__init__()
        self.level = torch.nn.Parameter(torch.tensor(0.5))

    def purify(self, x, stream):
        return x / 2


class Used(Inference):
    kind: Literal["used"]
    network_kinds = ("grey",)
"""
Install = Callable[..., Path]
CACHES = (plugins._loaded, plugins._points, plugins._digest, identities._digest_of)


def forget(folder: Path) -> None:
    """Forget the plugins of a folder, as a new process does."""
    for cache in CACHES:
        cache.cache_clear()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution with one module, as pip would leave it."""
    site = tmp_path / "site-packages"
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(plugins, "_tags", set())

    def install(
        named: str = "Grey", text: str = SECTION, name: str = "first", group: str = "purifiers",
        version: str = "1.0", module: str = "",
    ) -> Path:  # fmt: skip
        module = module or f"{name}_kinds"
        file = site.joinpath(*module.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        about = site / f"{name}.dist-info"
        about.mkdir(exist_ok=True)
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        points = f"[limpid.{group}]\n" + "".join(
            f"{one.lower()} = {module}:{one}\n" for one in named.split()
        )
        (about / "entry_points.txt").write_text(points)
        forget(tmp_path)
        return file

    yield install
    forget(tmp_path)


def built(name: str = "Networks") -> Any:
    """Return a union with the plugins that are installed."""
    sys.modules["a_room"] = ModuleType("a_room")
    table = {"Networks": (Identity | Median, PurifierSection), "Uses": (Used | Other, Inference)}
    return plugins.unions("a_room", "purifiers", table)(name)


class Used(Inference):
    kind: Literal["built_in_use"]


class Other(Inference):
    kind: Literal["other_use"]


def named_in(union: Any, kind: str = "grey") -> str:
    """Return what `plugin` must be in a section."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(union).validate_python({"kind": kind})
    (error,) = caught.value.errors()
    assert error["type"] == plugins.OTHER
    return str(error["ctx"]["right"])


def test_a_kind_of_a_plugin_is_in_the_union_of_its_base_class(install: Install) -> None:
    assert list(members(built())) == ["identity", "median"]
    install("Grey Used")
    assert list(members(built())) == ["identity", "median", "grey"]
    assert list(members(built("Uses"))) == ["built_in_use", "other_use", "used"]
    assert list(members(sys.modules["a_room"].Uses)) == ["built_in_use", "other_use", "used"]
    with pytest.raises(AttributeError, match="module a_room has no attribute Nothing"):
        built("Nothing")


@pytest.mark.parametrize(
    ("named", "text", "sentence"),
    [
        ("Grey", "import absent_thing", "cannot be imported, ModuleNotFoundError: No module named"),
        ("Grey", "1 / 0", "cannot be imported, ZeroDivisionError: division by zero; repair it, or"),
        ("Gray", SECTION, "cannot be imported, AttributeError: module 'first_kinds' has no"),
        ("Half", SECTION, "is first_kinds:Half, which is no section: a Config with one field"),
        ("Inference", SECTION, "is first_kinds:Inference, which is no section"),
        ("Grey", SECTION.replace('"grey"', '"Grey"'), "is first_kinds:Grey, which is no section"),
        ("Grey", SECTION.replace('"grey"', '"a", "b"'), "is first_kinds:Grey, which is no section"),
        ("Grey", SECTION.replace('["grey"]', '["grey"]\n    plugin: str'), "none called plugin"),
        (
            "Grey", SECTION.replace("Grey(PurifierSection)", "Grey(Config)"),
            "which is no components.models.purifiers.contract.PurifierSection or components.models",
        ),
        ("Grey", SECTION.replace('"grey"', '"median"'), "has the kind median, which Limpid has:"),
        ("Grey", SECTION.replace('"grey"', '"external"'), "has the kind external, which Limpid"),
        ("Grey", SECTION.replace('"grey"', '"other_use"'), "has the kind other_use, which Limpid"),
        (
            "Grey", "import half_made\n\nhalf_made.absent",
            "(most likely due to a circular import); let its modules import nothing of pipelines",
        ),
    ],
)  # fmt: skip
def test_a_plugin_that_cannot_be_used_is_one_sentence(
    install: Install, named: str, text: str, sentence: str
) -> None:
    file = install(named, text)
    (file.parent / "half_made.py").write_text("import first_kinds\n\nfirst_kinds.Grey\n")
    with pytest.raises(PluginError) as caught:
        built()
    message = str(caught.value)
    assert message.startswith(f"the plugin first (limpid.purifiers: {named.lower()}) ")
    assert sentence in message and "\n" not in message
    # It is not left out the next time.
    with pytest.raises(PluginError):
        built()


def test_two_plugins_with_one_kind_are_one_sentence(install: Install) -> None:
    install(name="first")
    install(name="second")
    with pytest.raises(PluginError) as caught:
        built()
    assert str(caught.value) == (
        "the plugin second (limpid.purifiers: grey) has the kind grey, and so has the plugin first "
        "(limpid.purifiers: grey): rename one of them, or uninstall the plugin"
    )


def test_a_section_names_the_plugin_that_is_installed_and_no_other(install: Install) -> None:
    install()
    networks = built()
    pin = named_in(networks)
    assert pin.startswith("first 1.0 sha256-") and len(pin.partition("sha256-")[2]) == 64
    section = TypeAdapter(networks).validate_python({"kind": "grey", "plugin": pin})
    assert section.model_dump() == {"kind": "grey", "plugin": pin}
    assert TypeAdapter(networks).validate_python(section.model_dump()) == section
    for named, reason in (("first 1.0 sha256-0", "names first 1.0 sha256-0"), ("", "is missing")):
        with pytest.raises(ValidationError) as caught:
            TypeAdapter(networks).validate_python({"kind": "grey", "plugin": named})
        _, message = plugins.in_words(caught.value)
        assert message == f"{reason}, and {pin} is installed"


def test_the_digest_is_of_all_files_of_the_package_and_of_nothing_else(install: Install) -> None:
    def pin_after(change: Callable[[Path], Any], **how: str) -> str:
        file = install(module="first_kinds.inner.sections", **how)
        top = file.parent.parent
        for package in (top, file.parent):
            (package / "__init__.py").touch()
        change(top)
        return named_in(built())

    first = pin_after(lambda top: (top / "table.json").write_text("[1]"))
    assert pin_after(lambda top: (top / ".swp").touch()) == first
    assert pin_after(lambda top: (top / "__pycache__").mkdir()) == first
    assert pin_after(lambda top: (top / "__pycache__/a.pyc").touch()) == first
    assert pin_after(lambda top: (top.parent / "beside.py").touch()) == first
    pins = {
        first,
        pin_after(lambda top: (top / "table.json").write_text("[2]")),
        pin_after(lambda top: (top / "inner/more.py").touch()),
        pin_after(lambda top: None, text=f"{SECTION}# A comment."),
        pin_after(lambda top: None, version="1.1"),
        pin_after(lambda top: (top / "table.json").unlink()),
    }
    assert len(pins) == 6


def test_a_section_travels_to_a_process_that_has_the_plugin_and_to_no_other(
    install: Install, tmp_path: Path
) -> None:
    file = install()
    networks = built()
    section = TypeAdapter(networks).validate_python({"kind": "grey", "plugin": named_in(networks)})
    packed = pickle.dumps(section)
    assert pickle.loads(packed) == section and b"first_kinds" not in packed
    (file.parent / "first.dist-info/entry_points.txt").unlink()
    forget(tmp_path)
    with pytest.raises(PluginError, match=r"no plugin here has grey in limpid\.purifiers: install"):
        pickle.loads(packed)


def test_an_unknown_kind_may_come_from_a_plugin(install: Install) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(built()).validate_python({"kind": "grey"})
    _, message = plugins.in_words(caught.value)
    assert message.endswith("; if it comes from a plugin, this Python lacks it: install it here")


def test_a_plugin_that_is_imported_first_finds_the_rooms_of_its_base_classes(
    install: Install,
) -> None:
    """Its own tests begin with it."""
    install()
    first = importlib.import_module("first_kinds")
    assert issubclass(members(built())["grey"], first.Grey)
    assert first.Grey(kind="grey").build((1, 8, 8)), "by itself it needs no plugin to be named"


def test_a_check_is_asked_for_by_name_and_names_its_plugin(install: Install) -> None:
    text = "def dark(bench):\n    return bench\n\n\nlight = 3\n"
    assert plugins.checks({}) == {}
    with pytest.raises(PluginError, match="no plugin here has the check dark; there is none"):
        plugins.checks({"dark": ""})
    install("dark light", text, group="checks")

    def refused(**named: str) -> PydanticCustomError:
        with pytest.raises(PydanticCustomError) as caught:
            plugins.checks(named)
        assert caught.value.type == plugins.OTHER
        return caught.value

    error = refused(dark="")
    assert error.context is not None
    pins = error.context["right"]
    assert list(pins) == ["dark"] and pins["dark"].startswith("first 1.0 sha256-")
    assert error.message() == f"is missing for dark, and {pins['dark']} is installed"
    assert refused(dark="old").message().startswith("names old for dark, and first 1.0 sha256-")
    assert plugins.checks(pins)["dark"](5) == 5
    for name, reason in (
        ("gray", "no plugin here has the check gray; there are dark, light"),
        (
            "light",
            r"the plugin first \(limpid.checks: light\) is first_kinds:light, which is no fun",
        ),
    ):
        with pytest.raises(PluginError, match=reason):
            plugins.checks({name: ""})


def test_a_check_that_fails_ends_in_one_sentence(install: Install) -> None:
    text = (
        "import torch\n\n\ndef dark(bench):\n    raise KeyError(bench)\n\n\n"
        "def full(bench):\n    raise torch.OutOfMemoryError(bench)\n"
    )
    install("dark full", text, group="checks")
    with pytest.raises(PydanticCustomError) as caught:
        plugins.checks({"dark": "", "full": ""})
    assert caught.value.context is not None
    found = plugins.checks(caught.value.context["right"])
    said = r"the plugin first \(limpid.checks: dark\) failed in its check, KeyError: 7; repair it"
    with pytest.raises(PluginError, match=said):
        found["dark"](7)
    with pytest.raises(torch.OutOfMemoryError):
        found["full"]("no room")


def test_two_plugins_with_one_check_are_refused_where_it_is_asked_for(install: Install) -> None:
    text = "def dark(bench):\n    return bench\n"
    install("dark", text, group="checks")
    install("dark", text, group="checks", name="second")
    assert plugins.checks({}) == {}
    with pytest.raises(
        PluginError, match=r"has the check dark, and so has the plugin first .*: re"
    ):
        plugins.checks({"dark": ""})


# What it computes


def half(install: Install, text: str = SECTION) -> torch.nn.Module:
    install(text=text)
    section = members(built())["grey"].model_construct(kind="grey")
    network: torch.nn.Module = section.build((1, 8, 8))  # type: ignore[attr-defined]
    return network


def test_the_code_of_a_plugin_identifies_its_networks_as_ours_does(install: Install) -> None:
    """It lies where libraries lie, which are left out."""
    digest = code_digest(half(install))
    assert code_digest(half(install, f"{SECTION}# A comment.\n")) == digest
    assert code_digest(half(install, SECTION.replace("x / 2", "x / 3"))) != digest


def test_a_package_is_found_inside_of_a_namespace(install: Install) -> None:
    """All that lies in a namespace is not one plugin."""
    file = install(module="space.first_kinds.sections")
    (file.parent / "__init__.py").touch()
    (file.parent.parent / "neighbour.py").touch()
    assert list(members(built())) == ["identity", "median", "grey"]
    importlib.import_module("space.neighbour")
    assert package_of("space.first_kinds.sections") == "space.first_kinds"
    assert is_plugin("space.first_kinds") and is_plugin("space.first_kinds.sections")
    assert not is_plugin("space.neighbour") and not is_plugin("space")
    network = importlib.import_module("space.first_kinds.sections").Half()
    assert "space.first_kinds.sections" in identities.sources(identities.modules_of(network))


@pytest.fixture
def folder(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with the network of a plugin."""
    assert purifiers.PurifierConfig, "it is there to be put back"
    monkeypatch.delitem(vars(purifiers), "PurifierConfig")
    install()
    model = {"kind": "grey", "plugin": named_in(purifiers.PurifierConfig)}
    card = ModelCard(
        format=1, family="purifier", model=model, shape=[1, 8, 8], class_names=["a"], provenance={}
    )
    save(tmp_path / "model", half(install), card)
    return tmp_path / "model"


def test_a_model_folder_is_read_with_the_plugin_that_made_it_alone(
    folder: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(load(folder)(x), x / 2)
    assert read_section(folder).kind == "grey"

    def refusals(text: str, group: str = "purifiers") -> set[str]:
        monkeypatch.delitem(vars(purifiers), "PurifierConfig")
        install(text=text, group=group)
        found = set()
        for read in (load, read_section):
            with pytest.raises(DataError) as caught:
                read(folder)
            found.add(str(caught.value))
        return found

    (changed,) = refusals(SECTION.replace("x / 2", "x / 3"))
    assert changed.startswith(
        f"{folder / 'config.json'}: the plugin of its network names first 1.0"
    )
    assert changed.endswith(
        " is installed: install the one that it names, or train the network again"
    )
    (gone,) = refusals(SECTION, group="others")
    assert gone.startswith(f"{folder / 'config.json'} describes no valid network: Input tag 'grey'")
    assert gone.endswith("if it comes from a plugin, this Python lacks it: install it here")
    assert "\n" not in changed + gone
