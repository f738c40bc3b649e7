"""The programs of ../shared/reports: situations of real users, which exit with 0 where bidm does right.

They were written against the modules of 0.1.0, so their imports are moved to where these things are now.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPORTS = Path(__file__).resolve().parents[3] / "shared" / "reports"
MOVED = {
    "from bidm_cli.checkpoints.unpickle import": "from bidm_cli.checkpoints.reading.unpickle import",
    "from bidm_cli.diffusion.image_sets import": "from bidm_cli.data.image_sets import",
    "from bidm_cli.report.features import": "from bidm_cli.report.metrics.features import",
    "from bidm_cli.report.metrics import compare, statistics_of": (
        "from bidm_cli.report.metrics.base import statistics_of\n"
        "from bidm_cli.report.metrics.compare import compare"
    ),
}
RUN = "import sys; path = sys.argv[1]; exec(compile(sys.stdin.read(), path, 'exec'), {'__file__': path})"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.parent.name for path in REPORTS.glob("*/repro.py")))
def test_the_situation_comes_out_right(name: str) -> None:
    path = REPORTS / name / "repro.py"
    program = path.read_text(encoding="utf-8")
    for old, new in MOVED.items():
        program = program.replace(old, new)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path)], input=program, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
