"""Put the grids of several sample folders side by side, as they came out, with a caption over each.

python benchmarks/compare_grids.py out.png "original=samples/digits-original" "packed=samples/digits"
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MARGIN, CAPTION = 12, 26


def main() -> None:
    """Put the grids side by side and write the picture."""
    out, *pairs = sys.argv[1:]
    columns = [pair.partition("=")[::2] for pair in pairs]
    grids = [Image.open(Path(folder) / "grid.png").convert("RGB") for _, folder in columns]
    width = sum(grid.width for grid in grids) + MARGIN * (len(grids) + 1)
    height = max(grid.height for grid in grids) + CAPTION + MARGIN
    canvas = Image.new("RGB", (width, height), "white")
    draw, font, left = ImageDraw.Draw(canvas), ImageFont.load_default(15), MARGIN
    for (caption, _), grid in zip(columns, grids, strict=True):
        draw.text((left, 5), caption, fill="black", font=font)
        canvas.paste(grid, (left, CAPTION))
        left += grid.width + MARGIN
    canvas.save(out, optimize=True)


if __name__ == "__main__":
    main()
