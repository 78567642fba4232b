"""Bring about every fault with its full count, print the table, and write it into docs/reliability.md.

    python -m tests.torture [--seed N] [--quick] [NAME ...]

NAME: only the faults whose name holds this text. The table is written after runs with full counts; faults that were not
run keep the lines that they have, and without such a line for each nothing is written.
Takes about a quarter of an hour on two cores. Exit status: 0 nothing lost, 1 something was lost, 2 no such fault.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from src.storage import write_atomic
from tests.torture.fault import Outcome
from tests.torture.table import DOCUMENT, ROWS, console_line, document, rows_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    chosen = [name for name in ROWS if not options.names or any(part in name for part in options.names)]
    if not chosen:
        print(f"no fault is called {' or '.join(options.names)}; there are:\n  " + "\n  ".join(ROWS), file=sys.stderr)
        return 2
    outcomes: dict[str, Outcome] = {}
    for name in chosen:
        row, began = ROWS[name], time.monotonic()
        rounds = row.quick if options.quick else row.rounds
        if not rounds:
            continue
        with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
            try:
                outcomes[name] = row.run(random.Random(f"{options.seed} {name}"), Path(tmp), rounds)
            except Exception as error:  # outside of a trial: the other faults are brought about all the same
                outcomes[name] = Outcome(tried=1, lost=[f"not carried out: {type(error).__name__}: {error}"])
        print(console_line(name, outcomes[name], time.monotonic() - began), flush=True)
        for line in outcomes[name].lost:
            print(f"    LOST {line}", flush=True)
    lost = sum(len(outcome.lost) for outcome in outcomes.values())
    tried = sum(outcome.tried for outcome in outcomes.values())
    print(f"{tried - lost} of {tried} survived, {lost} lost")
    text = DOCUMENT.read_text(encoding="utf-8")
    if not options.quick and {*outcomes, *rows_of(text)} == set(ROWS):
        write_atomic(DOCUMENT, document(text, outcomes).encode())
        print(f"the table is in {DOCUMENT.name}")
    return 1 if lost else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.torture", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of the name of a fault (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the random places and moments (default: 0)")
    parser.add_argument("--quick", action="store_true", help="the few rounds that the tests take")
    return parser


if __name__ == "__main__":
    sys.exit(main())
