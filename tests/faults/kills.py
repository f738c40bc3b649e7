"""``kill -9`` at random moments of training, packing and sampling: the same bytes in the end.

python -m tests.faults.kills --kills 20 [--seed 0] [--work training]
python -m tests.faults.kills --kills 20 --processes 2   # one of the two, or both and what started them

Prints the steps or images that were there at each kill, per run, and the kills and runs of each kind of work.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from tests.faults.processes import Started, done
from tests.faults.work import WORKS, WORKS_OF_TWO, Work, begin, content, leftovers, prepare


def kill_repeatedly(work: Work, whole: Path, folder: Path, kills: int, seed: int = 0) -> None:
    """Kill runs of ``work`` ``kills`` times in all, finish each, compare, and print what was done.

    Raises:
        AssertionError: other bytes than those in ``whole``, a run that cannot be continued, or leftovers.
    """
    chance = random.Random(seed)
    first, seconds = _moments(work, whole, folder / f"{work.name}-timed")
    timed = seconds
    killed, runs = 0, 0
    while killed < kills:
        begin(work, whole, run := folder / f"{work.name}-{runs}")
        reached: list[str] = []
        # At most five kills per run: later ones would mostly hit the start.
        for _ in range(min(5, kills - killed)):
            rank = chance.choice([None, *range(work.processes)]) if work.processes > 1 else None
            if not Started(words_of(work, run), run).kill_after(chance.uniform(first, seconds), rank):
                # The run that was timed was a slow one.
                first, seconds = 0.7 * first, 0.7 * seconds
                break
            whom = "" if work.processes == 1 else " all" if rank is None else f" #{rank}"
            reached.append(_reached(run, work) + whom)
        done(words_of(work, run), run)
        assert content(run, work) == content(whole, work), f"{run} differs"
        assert not leftovers(run), leftovers(run)
        killed, runs = killed + len(reached), runs + 1
        print(
            f"{work.name}, run {runs}: killed at {', '.join(reached) or 'no moment'}; the same bytes",
            flush=True,
        )
    print(
        f"{work.name}: {killed} kills in {runs} runs of {timed:.1f} s each, the same bytes in all",
        flush=True,
    )


def _moments(work: Work, whole: Path, folder: Path) -> tuple[float, float]:
    """First moment to kill a run at, once it has opened everything, and the last; seconds from its start."""
    begin(work, whole, folder)
    began = time.monotonic()
    run = Started(work.words, folder)
    run.when(lambda: work.begun(folder))
    first = time.monotonic() - began
    status, printed = run.end()
    assert status == 0, printed
    return first, time.monotonic() - began


def words_of(work: Work, folder: Path) -> tuple[object, ...]:
    """The command that begins or continues ``work``."""
    return (*work.words, *work.again) if (folder / "run" / "recipe.yaml").exists() else work.words


def _reached(folder: Path, work: Work) -> str:
    """Steps or images that are there, and states or temporaries that were being written."""
    log = folder / "run" / "log.csv"
    steps = len(log.read_text().splitlines()) - 1 if log.exists() else 0
    there = len(list((folder / "samples").glob("0*.png"))) if "samples" in work.results else steps
    written = any(not name.startswith(".lock") for name in leftovers(folder))
    return f"{there}{' (writing)' if written else ''}"


def main() -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", choices=[work.name for work in WORKS])
    parser.add_argument("--processes", type=int, choices=[1, 2], default=1)
    options = parser.parse_args()
    of_all = WORKS if options.processes == 1 else WORKS_OF_TWO
    with tempfile.TemporaryDirectory() as folder:
        works = [work for work in of_all if work.name.startswith(options.work or "")]
        whole = prepare(Path(folder), works)
        for work in works:
            kill_repeatedly(work, whole, Path(folder), options.kills, options.seed)


if __name__ == "__main__":
    main()
