"""The page of ``bidm report`` on the bundled models, and its pictures in docs/report.

    python benchmarks/report_page.py FOLDER [--bench]     # desktop.png, phone.png and dark.png anew

Draws what is missing in FOLDER, so a second run is quick. Needs the extra ``features`` and Chromium.
``--bench`` adds times, which are worth something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("demo/faces-w1a2.bidm", "demo/faces-w1a1.bidm", "demo/ldm4_peeps.ckpt")
ENLARGE = "<script>document.querySelector(\"[aria-label='Enlarge picture 5']\").click()</script>"
FRAME = '<body style="margin:0"><iframe src="{}" style="border:0;width:390px;height:{}px"></iframe></body>'


def main() -> None:
    """Write the page, then take its pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bench", action="store_true")
    parser.add_argument("--draw", type=int, default=64)
    arguments = parser.parse_args()
    page = write_page(arguments.folder, arguments.draw, arguments.bench)
    with tempfile.TemporaryDirectory() as name:
        write_pictures(page, ROOT / "docs" / "report", Path(name))


def write_page(folder: Path, draw: int, bench: bool) -> Path:
    """Run the commands as a user does, in ``folder``; path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    bidm = [sys.executable, "-c", "from bidm_cli.cli.main import main; main()"]
    asked = ["report", *MODELS, "--reference", "demo/faces.npz", "--features", "efficientnet-lite0"]
    asked += ["--draw", str(draw), "--html", "report.html", *(["--bench"] if bench else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in (["demo", "demo"], asked):
        subprocess.run([*bidm, *command], cwd=folder, env=environment, check=True)
    return folder.resolve() / "report.html"


def write_pictures(page: Path, target: Path, scratch: Path) -> None:
    """Take the three pictures in headless Chromium."""
    content = page.read_text(encoding="utf-8")
    (scratch / "page.html").write_text(content, encoding="utf-8")
    (scratch / "large.html").write_text(content.replace("</body>", f"{ENLARGE}</body>"), encoding="utf-8")
    (scratch / "phone.html").write_text(FRAME.format("page.html", 2600), encoding="utf-8")
    take(scratch / "page.html", target / "desktop.png", (1120, 2900))
    take(scratch / "phone.html", target / "phone.png", (390, 2600), "--allow-file-access-from-files")
    take(scratch / "large.html", target / "dark.png", (1000, 840), "--blink-settings=preferredColorScheme=0")


def take(page: Path, target: Path, size: tuple[int, int], *flags: str) -> None:
    """One picture of the upper left ``size`` pixels, with 256 colours."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("Chromium is not installed")
    shot, window = (
        page.with_suffix(".png"),
        f"{max(size[0], 500)},{size[1]}",
    )  # no window is narrower than 500
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--timeout=60000"]
    own = [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={window}", f"--screenshot={shot}"]
    run = [chromium, *fixed, *own, *flags, page.as_uri()]
    subprocess.run(run, capture_output=True, timeout=300, check=True)
    image = Image.open(shot).convert("RGB").crop((0, 0, *size))
    image.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
    print(target, f"{target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
