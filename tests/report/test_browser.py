"""The page in headless Chromium: mouse, finger and keyboard, a phone's width, dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bidm_cli.report.pages.page import to_html
from bidm_cli.report.pages.summary import Report
from tests.report.test_pictures import SETTINGS, drawn

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

ACTIONS = """
<script>
const found = {}, stages = document.querySelectorAll(".pictures .stage"), first = stages[0];
const slider = first.querySelector("input"), dialog = document.querySelector("dialog");
const cut = () => first.style.getPropertyValue("--cut");
const shown = () => [...first.querySelectorAll("img")].filter((i) => getComputedStyle(i).display !== "none")
  .map((i) => i.dataset.set + i.classList[i.classList.length - 1]);
const pointer = (kind, type, x) => slider.dispatchEvent(
  new PointerEvent(kind, {pointerType: type, clientX: x, bubbles: true}));
const key = (name) => slider.dispatchEvent(
  new KeyboardEvent("keydown", {key: name, bubbles: true, cancelable: true}));
const box = slider.getBoundingClientRect();
found.start = [cut(), shown()];
pointer("pointermove", "mouse", box.left + box.width / 4); found.mouse = cut();
pointer("pointerleave", "mouse", 0); found.left = cut();
pointer("pointermove", "touch", box.left); found.touchMove = cut();
slider.value = 80; slider.dispatchEvent(new Event("input")); found.drag = cut();
key(" "); found.space = cut(); key(" "); found.spaceAgain = cut();
pointer("click", "touch", 0); found.tap = dialog.open;
pointer("click", "mouse", 0); found.click = dialog.open;
found.title = dialog.querySelector(".title").textContent;
found.large = dialog.querySelectorAll("img").length;
found.focus = document.activeElement.closest("dialog") !== null;
dialog.querySelector(".before").click(); found.before = dialog.querySelector(".title").textContent;
dialog.querySelector(".close").click(); found.closed = dialog.open;
key("Enter"); found.enter = dialog.open; dialog.close();
const right = document.querySelectorAll("select")[1];
right.value = "1"; right.dispatchEvent(new Event("change")); found.chosen = shown();
found.alts = [...document.querySelectorAll(".pictures img")].every((i) => i.alt);
found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
found.ground = getComputedStyle(document.body).backgroundColor;
document.body.setAttribute("data-found", JSON.stringify(found));
</script>
"""


def in_browser(page: Path, *flags: str) -> dict[str, Any]:
    """What ACTIONS found, run at the end of the page."""
    profile = f"--user-data-dir={page.parent / 'profile'}"
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", profile, "--dump-dom", "--timeout=60000"]
    run = [str(CHROMIUM), *fixed, *flags, page.as_uri()]
    dom = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True).stdout
    (found,) = re.findall(r'data-found="([^"]*)"', dom)
    return json.loads(html.unescape(found))


@pytest.fixture
def page(tmp_path: Path) -> Path:
    sets = [drawn(tmp_path / name, 4, 40 * i, SETTINGS) for i, name in enumerate("abc")]
    path = tmp_path / "page.html"
    content = str(to_html(Report([], samples=sets, notes=["x" * 300])))
    path.write_text(content.replace("</body>", ACTIONS + "</body>"))
    return path


def test_mouse_finger_and_keyboard(page: Path) -> None:
    found = in_browser(page, "--window-size=1100,900")
    assert found["start"] == ["50%", ["0right", "2left"]], (
        "the last set is the original's, unless known better"
    )
    assert found["mouse"] == "25%" and found["left"] == "50%" and found["touchMove"] == "50%"
    assert found["drag"] == "80%" and found["space"] == "0%" and found["spaceAgain"] == "100%"
    assert found["click"] and not found["tap"] and found["enter"] and not found["closed"]
    assert found["title"].startswith("Picture 1 of 4") and found["before"].startswith("Picture 4 of 4")
    assert found["large"] == 3 and found["focus"] and found["alts"]
    assert found["chosen"] == ["1right", "2left"]


def test_a_phone_and_dark(page: Path) -> None:
    """A page as wide as a phone's has nothing that sticks out; the colours follow the reader's choice."""
    frame = page.parent / "frame.html"
    frame.write_text(
        f'<iframe src="{page.name}" style="border:0;width:390px;height:800px" onload="'
        'document.body.dataset.found = contentDocument.body.dataset.found"></iframe>'
    )
    dark = "--blink-settings=preferredColorScheme=0"
    found = in_browser(frame, "--allow-file-access-from-files", "--window-size=500,900", dark)
    assert found["wide"] <= 0 and found["ground"] == "rgb(15, 19, 25)"
