"""Lead every network through the whole path, and write the tables into docs/measured/networks.md.

    python -m tests.zoo [NAME ...]

NAME: only the networks whose name ("torchvision resnet18") holds this text; their rows replace those that an earlier
run left in build/networks.json. The page is written where every network has a row.
Exit status: 0 no step is wrong and none ends in another library's error, 1 one does, 2 no such network.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from src.storage import write_atomic
from tests.zoo.cases import Case
from tests.zoo.handmade import HANDMADE
from tests.zoo.page import Row, page
from tests.zoo.peer import peer
from tests.zoo.public import TIMM, TORCHVISION
from tests.zoo.walk import output_channels, share, walk

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "build" / "networks.json", ROOT / "docs" / "measured" / "networks.md"
FAMILIES = {"hand-made": HANDMADE, "torchvision": TORCHVISION, "timm": TIMM}
CASES = {f"{family} {name}": (family, name, case) for family, of in FAMILIES.items() for name, case in of.items()}
LIBRARIES = ("torch", "torchvision", "timm", "torch-pruning")


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    chosen = [key for key in CASES if not arguments or any(text in key for text in arguments)]
    if not chosen:
        print(f"no network is called {' or '.join(arguments)}; there are:\n  " + "\n  ".join(CASES), file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = {key: Row(**row) for key, row in json.loads(RESULTS.read_text()).items()} if RESULTS.exists() else {}
    for key in chosen:
        begun = time.monotonic()
        rows[key] = examine(*CASES[key])
        print(f"{key} ({time.monotonic() - begun:.0f} s): {'; '.join(rows[key].faults) or 'no fault'}", flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        write_atomic(RESULTS, json.dumps({name: asdict(row) for name, row in rows.items()}, indent=1).encode())
        gc.collect()
    if CASES.keys() <= rows.keys():
        text = page([rows[key] for key in CASES], {name: version(name) for name in LIBRARIES})
        write_atomic(PAGE, text.encode())
        print(f"the tables are in docs/measured/{PAGE.name}")
    return 1 if any(rows[key].faults for key in chosen) else 0


def examine(family: str, name: str, case: Case) -> Row:
    """Everything that is known of a network."""
    with tempfile.TemporaryDirectory(prefix="networks-") as folder:
        walker, steps = walk(case, Path(folder))
    channels = sum(output_channels(walker.network).values())
    found = share(walker.network, walker.groups) if walker.groups is not None else None
    del walker
    theirs = peer(case)
    return Row(family, name, channels, found, steps, theirs.share, theirs.whole, theirs.filters)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
