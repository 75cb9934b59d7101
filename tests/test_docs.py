"""What README and docs name is there: files, folders, and the imports of their examples."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from project import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "examples").glob("*/*.md"))
FOLDERS = "components|pipelines|tests|benchmarks|profiles|deploy|docs|examples"
NAMED = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*-]*\w")
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    named = set(NAMED.findall(page.read_text("utf-8")))
    missing = [name for name in named if not any(ROOT.glob(name))]
    assert not missing


def test_the_examples_import_what_is_there() -> None:
    examples = [code for page in PAGES for code in EXAMPLE.findall(page.read_text("utf-8"))]
    assert examples
    for code in examples:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module
