"""The report in a real browser: what is shown, picked and drawn, on a desk and on a phone."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from fake_evaluation import PROBES, RIGHT, FakeEvaluation

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no chromium and no chrome on the path")
# Inspects the page as laid out, picks another defense and another attack, and inspects it again.
SCRIPT = """
const seen = () => [...document.querySelectorAll("#images table")]
  .filter((table) => table.offsetParent !== null)
  .map((table) => table.closest(".scroll").getAttribute("aria-label"));
const pick = (text) => [...document.querySelectorAll("#images label")]
  .find((label) => label.offsetParent !== null && label.textContent === text).click();
const lines = (id) => [...document.querySelectorAll(`#${id} polyline`)]
  .filter((line) => line.getTotalLength() > 50 && line.getBoundingClientRect().width > 50).length;
const found = {
  width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth,
  rows: document.querySelectorAll(".scores tbody tr:not(.group)").length,
  radius: lines("radius"), compute: lines("compute"), training: lines("training"),
  first: seen(), claims: document.querySelector(".claims").getBoundingClientRect().bottom,
};
pick("student_grey"); found.defense = seen();
pick("grey box, pgd"); found.attack = seen();
const tile = document.querySelector("#images td i");
found.picture = getComputedStyle(tile).backgroundImage.slice(0, 26);
const result = document.createElement("pre");
result.id = "found"; result.textContent = JSON.stringify(found);
document.body.append(result);
"""


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return FakeEvaluation(tmp_path_factory.mktemp("evaluation")).html()


def browse(page: Path, *options: str) -> tuple[str, list[str]]:
    """Open a page without a network; return its DOM and the messages of the browser's console."""
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--enable-logging=stderr", "--v=0", "--disable-background-networking",
            f"--user-data-dir={page.parent / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files",
            *options, "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_report_opens_without_errors_and_without_the_network(html: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(html)
    dom, console = browse(page)
    assert console == [] and 'id="scores"' in dom
    # The page's own policy forbids every request, and the console reports the attempt.
    page.write_text(html.replace("</main>", '<img src="https://example.org/a.png"></main>'))
    _, console = browse(page)
    assert console and "example.org" in console[0]


@pytest.mark.parametrize("width", [390, 1280])
def test_picking_a_defense_and_an_attack_shows_its_pictures(
    html: str, tmp_path: Path, width: int
) -> None:
    page, frame = tmp_path / "page.html", tmp_path / "frame.html"
    policy = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')
    assert policy.search(html)
    bare = policy.sub("", html)
    page.write_text(bare.replace("</body>", f"<script>{SCRIPT}</script></body>"))
    # A window is at least 500 pixels wide; a frame takes any width.
    frame.write_text(
        f'<iframe src="page.html" style="border:0;width:{width}px;height:3000px"></iframe><script>'
        'onload = () => { const inner = document.querySelector("iframe").contentDocument;'
        'document.body.append(inner.getElementById("found")); }</script>'
    )
    dom, console = browse(frame, "--window-size=1400,3000")
    assert console == []
    (printed,) = re.findall(r'<pre id="found">(.*?)</pre>', dom)
    found: dict[str, Any] = json.loads(unescape(printed))
    assert found["width"] == width and found["overflow"] <= 0
    assert found["rows"] == len(RIGHT)
    assert found["radius"] == len(PROBES) and found["compute"] == 2 and found["training"] >= 8
    assert found["first"] == ["student_adaptive: full gradient, pgd"]
    assert 200 < found["claims"] < 800, "the chart does not end on the first screen"
    assert found["defense"] == ["student_grey: full gradient, pgd"]
    assert found["attack"] == ["student_grey: grey box, pgd"]
    assert found["picture"] == 'url("data:image/png;base64'
