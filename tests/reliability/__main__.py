"""Bring about every failure many times, print the table, and write it into docs/measured/reliability.md.

    python -m tests.reliability [--tries N] [--minutes M] [--seed N] [NAME ...]

NAME: only the failures whose name holds this text; the table is not written then. Every failure is tried once before
any is tried twice, and so on; after --minutes no further try begins, and the table says how many there were.
Takes about 20 minutes on two cores with the default of 100 tries.
Exit status: 0 nothing lost, 1 something was lost, 2 no such failure.
"""

from __future__ import annotations

import argparse
import collections
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from src.runs import versions
from src.storage import write_atomic
from tests.reliability import failures, files, long_runs, processes
from tests.reliability.small_run import Row, Unbroken, train_unbroken

ROWS: dict[str, Row] = {**processes.ROWS, **failures.ROWS, **files.ROWS, **long_runs.ROWS}
PAGE = Path(__file__).parents[2] / "docs" / "measured" / "reliability.md"


Results = dict[str, tuple[collections.Counter[str], list[str]]]
"""By the name of a failure: how often each word was returned, and what was lost."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    rows = {name: row for name, row in ROWS.items() if not options.names or any(n in name for n in options.names)}
    if not rows:
        print(f"no failure is called {' or '.join(options.names)}; there are:\n  " + "\n  ".join(ROWS), file=sys.stderr)
        return 2
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started; sums depend on it
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="reliability-") as tmp:
        unbroken = train_unbroken(Path(tmp) / "unbroken" / "run")
        end = time.monotonic() + 60 * options.minutes
        results = try_all(rows, options.tries, options.seed, unbroken, Path(tmp), end)
    lost = sum(len(losses) for _, losses in results.values())
    print(f"{sum(came.total() for came, _ in results.values()) + lost} tries, {lost} lost")
    if rows == ROWS:
        PAGE.parent.mkdir(exist_ok=True)
        write_atomic(PAGE, page(results).encode())
        print(f"the table is in docs/measured/{PAGE.name}")
    return 1 if lost else 0


def try_all(rows: Mapping[str, Row], tries: int, seed: int, unbroken: Unbroken, tmp: Path, end: float) -> Results:
    """Try each failure `tries` times its share, at least once, in turns, until the time `end`."""
    results: Results = {name: (collections.Counter(), []) for name in rows}
    for number in range(tries):
        for name, row in rows.items():
            if number >= max(1, round(row.share * tries)) or time.monotonic() > end:
                continue
            came, lost = results[name]
            with tempfile.TemporaryDirectory(dir=tmp) as folder:
                try:
                    came[row.trial(random.Random(f"{seed} {name} {number}"), Path(folder), unbroken)] += 1
                except (Exception, SystemExit) as error:
                    lost.append(f"{name}, try {number}: {type(error).__name__}: {str(error)[:1000]}")
                    print(f"LOST {lost[-1]}", flush=True)
    return results


def page(results: Results) -> str:
    """The table as a page: what was done, how often, how often it was survived, and what counts as that."""
    lines = [
        "# Failures, and how often they were survived",
        "",
        "Written by `make torture`; [reliability.md](../reliability.md) says what is promised and how it is done.",
        "",
        "| failure | tried | survived | lost | survived means |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, (came, lost) in results.items():
        words = ", ".join(f"{count} {word}" for word, count in sorted(came.items()) if word)
        note = f" ({words})" if words else ""
        counts = f"{came.total() + len(lost)} | {came.total()} | {len(lost)}"
        lines.append(f"| {name} | {counts} | {ROWS[name].survived}{note} |")
    found = versions()
    shaping = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "numpy", "matplotlib"))
    lines += ["", f"On {platform.system()} with {shaping}.", ""]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.reliability", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of the name of a failure (default: all)")
    parser.add_argument("--tries", type=int, default=100, help="tries of each quick failure (default: 100)")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no further try after this (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the random places and moments (default: 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
