"""Log of a training: its rows, as a table in log.csv and as events of TensorBoard."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidm_cli.files import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass
class LogRow:
    """Means over the steps since the row before."""

    step: int
    loss: float
    noise_loss: float
    feature_loss: float
    gradient_norm: float
    lr: float

    def losses_text(self) -> str:
        """The losses in words, for a line of progress."""
        return f"loss {self.loss:.4f} (noise {self.noise_loss:.4f}, features {self.feature_loss:.4f})"


def columns(row_type: type[Any]) -> list[str]:
    """Columns of a log by the record of its rows."""
    return [field.name for field in fields(row_type)]


def write_log(run_dir: Path, row_type: type[Any], rows: Sequence[Any]) -> None:
    """Write log.csv, whole or not at all."""
    log = run_dir / "log.csv"
    with write_atomically(log) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns(row_type))
        writer.writerows(astuple(row) for row in rows)


@contextlib.contextmanager
def tensorboard_writer(run_dir: Path, step: int) -> Iterator[SummaryWriter | None]:
    """TensorBoard event file of a run that goes on after ``step``; None without the extra ``tensorboard``."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield None
        return
    with contextlib.closing(SummaryWriter(str(run_dir), purge_step=step + 1)) as board:
        yield board
