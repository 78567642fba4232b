"""Lay runs beside each other: what differed in their settings, how they went, and what they reached.

    python -m experiments.compare debug_output debug_output/previous/1 --output comparison.png

A run is a folder with `checkpoint.pt` (or the one before it), and `run.json` where it was finished. --output names a
PNG (the curves; the plane of accuracy against cost goes to the same name with "_plane") or a folder for both and a
table.
Exit status: 0, or 2 for bad input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.figures import png_bytes, run_curves, run_plane
from experiments.pipeline import SavedRun, comparison
from src.runs import PREVIOUS, RunError
from src.storage import CommandParser, fail, write_atomic


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = CommandParser("experiments.compare", __doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run's folder; previous/N of one is a run, too")
    parser.add_argument("--output", default="comparison.png", help="a PNG file or a folder (default: comparison.png)")
    options = parser.parse_args(arguments)
    try:
        labels, output = _labels(options.folders), Path(options.output)
        runs = [comparison.read_run(folder, label) for folder, label in zip(options.folders, labels, strict=True)]
        text = comparison.as_text(runs)
        print(text)
        print(f"\nFigures: {', '.join(map(str, _save(runs, output, text)))}")
    except ValueError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename or options.output!r}: {error.strerror or error}")
    return 0


def _save(runs: Sequence[SavedRun], output: Path, text: str) -> list[Path]:
    drawn = [comparison.series(run) for run in runs]
    if output.suffix.lower() == ".png":
        curves, plane = output, output.with_name(f"{output.stem}_plane.png")
    else:
        curves, plane = output / "curves.png", output / "plane.png"
        write_atomic(output / "comparison.txt", f"{text}\n".encode())
    write_atomic(curves, png_bytes(run_curves(drawn)))
    write_atomic(plane, png_bytes(run_plane(drawn)))
    return [curves, plane]


def _labels(folders: Sequence[str]) -> list[str]:
    """Short names that tell the folders apart: as many of their last parts as that takes."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for more in range(max(map(len, parts))):
        labels = ["/".join(path[-(3 if PREVIOUS in path[-2:-1] else 1) - more :]) for path in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise RunError(f"a folder is named twice among {', '.join(folders)}: name different runs")


if __name__ == "__main__":
    sys.exit(main())
