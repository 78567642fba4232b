"""Lay runs beside each other: what differed in their settings, how they went, and what they reached.

    python -m experiments.compare debug_output debug_output/previous/1 --output comparison.png

A run is a folder with `checkpoint.pt` (or the one before it), and `run.json` where it was finished. --output names a
PNG (the curves; the plane of accuracy against cost goes to the same name with "_plane") or a folder for both and a
table.
Exit status: 0, or 2 for bad input.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.figures import Series, plain_table, run_curves, run_plane
from experiments.notebook import display, live, widgets
from experiments.pipeline import RunConfig, config_from_json, contents, dense_macs, read_summary, relative_bops
from src.runs import CHECKPOINT, PREVIOUS, RunFolder, load_checkpoint
from src.storage import RunError, fail, write_atomic
from src.training import History

NOT_COMPARED = frozenset({"given", "data_root"})
MANY = 6
OTHER_IMAGES = (".jpg", ".jpeg", ".svg", ".pdf", ".gif", ".webp", ".eps")


@dataclass(frozen=True)
class SavedRun:
    """One run as its folder tells it. verdict: its state in run.json, or "not finished"; classes: of its last layer.

    data_digest: of the images and labels it was trained on, "" where it is not known.
    """

    label: str
    folder: Path
    config: RunConfig
    history: History
    classes: int
    data_name: str
    data_digest: str
    verdict: str

    def series(self) -> Series:
        """What the figures draw."""
        costs = relative_bops(self.history, dense_macs(self.config, self.classes))
        columns = ("accuracy", "unstructured_sparsity", "structured_sparsity", "mean_bits")
        return Series(self.label, self.history.epochs, {name: self.history.column(name) for name in columns}, costs)


def read_run(folder: str | Path, label: str = "") -> SavedRun:
    """Read a run's folder. Raises RunError, with what is in it, where that is no run."""
    path = Path(folder)
    if not RunFolder(path).has_checkpoint():
        raise RunError(f"{str(folder)!r} holds no run to compare: {contents(path)}; name a folder with {CHECKPOINT}")
    try:
        state = load_checkpoint(path / CHECKPOINT)
    except RunError as error:
        reason = str(error).removesuffix("; start without --resume")
        raise RunError(f"{reason}; leave {str(folder)!r} out") from error
    summary = read_summary(path)
    try:
        history = History.from_json(state["history"])
    except ValueError as error:
        raise RunError(f"the checkpoint in {str(folder)!r} holds no history of this version: {error}") from error
    if not len(history):
        raise RunError(f"the run in {str(folder)!r} has not finished an epoch: there is nothing to compare yet")
    config = config_from_json(state["config"])
    last = state["model"].get("linear.weight")
    return SavedRun(
        label=label or path.name,
        folder=path,
        config=config,
        history=history,
        classes=len(last) if last is not None else 10,
        data_name=str(summary.get("data", {}).get("name", config.data)),
        data_digest=str(state.get("data_digest", "")),
        verdict=str(summary.get("verdict", {}).get("state", "not finished")),
    )


def find_runs(folder: str | Path) -> dict[str, Path]:
    """Runs around a run's folder, by label: itself, earlier ones in its `previous/`, folders beside it and theirs."""
    here = Path(folder)
    places = [here, *sorted(entry for entry in here.resolve().parent.iterdir() if entry.resolve() != here.resolve())]
    found: dict[str, Path] = {}
    for place in places:
        if RunFolder(place).has_checkpoint():
            found[place.name] = place
        earlier = [entry for entry in (place / PREVIOUS).glob("[!.]*") if RunFolder(entry).has_checkpoint()]
        for entry in sorted(earlier, key=lambda entry: (len(entry.name), entry.name), reverse=True):
            found[f"{place.name}/{PREVIOUS}/{entry.name}"] = entry
    return found


def differing_settings(runs: Sequence[SavedRun]) -> list[dict[str, str]]:
    """Rows of a table: each setting that is not the same in all runs, and what it is in each."""
    settings = {run.label: {**vars(run.config), "data": run.data_name} for run in runs}
    same_data = len({run.data_digest or run.label for run in runs}) == 1  # whatever it was called
    names = [n for n in settings[runs[0].label] if n not in NOT_COMPARED and not (same_data and n == "data")]
    rows = []
    for name in names:
        values = {label: _plain(setting[name]) for label, setting in settings.items()}
        if len(set(values.values())) > 1:
            rows.append({"setting": name, **values})
    return rows


def notices(runs: Sequence[SavedRun]) -> list[str]:
    """What a reader must know before the runs are compared: that they were not trained on the same images."""
    if len({run.data_digest or run.data_name for run in runs}) < 2:
        return []
    on = ", ".join(f"{run.label} on {run.data_name}" for run in runs)
    return [f"NOTICE: these runs were trained on different images ({on}): their accuracies cannot be compared"]


def results(runs: Sequence[SavedRun]) -> list[dict[str, str]]:
    """Rows of a table: what each run reached, at its last epoch."""
    rows = []
    for run in runs:
        last = run.history.last
        rows.append(
            {
                "run": run.label,
                "epochs": f"{len(run.history)} of {run.history.epochs}",
                "accuracy": f"{last.accuracy:.1%}",
                "best accuracy": f"{run.history.column('accuracy').max():.1%}",
                "zeros": f"{last.unstructured_sparsity:.1%}",
                "dead filters": f"{last.structured_sparsity:.1%}",
                "bits": f"{last.mean_bits:.1f}",
                "relative BOPs": f"{run.series().relative_bops[-1]:.1%}",
                "verdict": run.verdict,
            }
        )
    return rows


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as text in columns."""
    if not rows:
        return "(none)"
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    lines = [names, ["-" * width for width in widths], *([row[name] for name in names] for row in rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def explorer(folder: str | Path, most: int = MANY) -> None:
    """In a notebook: choose among the runs around `folder`; curves, plane and tables follow the choice."""
    ipywidgets = widgets()

    known: dict[str, SavedRun] = {}
    refused: list[str] = []
    for label, path in find_runs(folder).items():
        try:
            known[label] = read_run(path, label)
        except ValueError as error:
            refused.append(f"{label}: {error}")
    if not known:
        raise RunError(f"no run to compare around {str(folder)!r}: {contents(Path(folder))}")

    def chosen(labels: Sequence[str]) -> list[SavedRun]:
        return [known[label] for label in labels] or [next(iter(known.values()))]

    height = f"{min(len(known), 8) * 1.4 + 0.8:.1f}em"
    pick = ipywidgets.SelectMultiple(
        options=list(known),
        value=tuple(known)[:most],
        description="runs",
        layout={"width": "min(34em, 95%)", "height": height},
    )
    live.explorer(lambda runs: run_curves([run.series() for run in chosen(runs)]), runs=pick)
    live.follow(lambda runs: run_plane([run.series() for run in chosen(runs)]), runs=pick)
    handle = display.put(*_shown_tables(chosen(pick.value), refused))
    pick.observe(lambda _: display.put(*_shown_tables(chosen(pick.value), refused), handle=handle), names="value")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare", description="Compare runs: settings, results, curves, accuracy and cost."
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run's folder; previous/N of one is a run, too")
    parser.add_argument("--output", default="comparison.png", help="a PNG file or a folder (default: comparison.png)")
    options = parser.parse_args(arguments)
    try:
        runs = [
            read_run(folder, label) for folder, label in zip(options.folders, _labels(options.folders), strict=True)
        ]
        _check_output(Path(options.output))
        tables = "\n\n".join(
            [f"{heading}\n{text_table(rows)}" for heading, rows in _tables(runs).items()] + notices(runs)
        )
        print(tables)
        print(f"\nFigures: {', '.join(map(str, _save(runs, Path(options.output), tables)))}")
    except ValueError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename or options.output!r}: {error.strerror or error}")
    return 0


def _check_output(output: Path) -> None:
    if output.suffix.lower() in OTHER_IMAGES and not output.is_dir():
        raise RunError(f"--output {str(output)!r}: figures are written as PNG; name a .png file or a folder")


def _save(runs: Sequence[SavedRun], output: Path, tables: str) -> list[Path]:
    series = [run.series() for run in runs]
    as_file = output.suffix.lower() == ".png"
    curves = output if as_file else output / "curves.png"
    plane = output.with_name(f"{output.stem}_plane.png") if as_file else output / "plane.png"
    write_atomic(curves, live.png_bytes(run_curves(series)))
    write_atomic(plane, live.png_bytes(run_plane(series)))
    if not as_file:
        write_atomic(output / "comparison.txt", f"{tables}\n".encode())
    return [curves, plane]


def _labels(folders: Sequence[str]) -> list[str]:
    """Short names that tell the folders apart: as many of their last parts as that takes."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for more in range(max(map(len, parts))):
        labels = ["/".join(path[-(3 if PREVIOUS in path[-2:-1] else 1) - more :]) for path in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise RunError(f"a folder is named twice among {', '.join(folders)}: name different runs")


def _tables(runs: Sequence[SavedRun]) -> dict[str, list[dict[str, str]]]:
    """Both tables by heading; one run has nothing to differ from."""
    settings = {"Settings that differ": differing_settings(runs)} if len(runs) > 1 else {}
    return {**settings, "Results": results(runs)}


def _shown_tables(runs: Sequence[SavedRun], refused: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The tables as a display's data and metadata, and what a reader must know about them."""
    page, text = [], []
    for heading, rows in _tables(runs).items():
        shown = plain_table(rows).to_html() if rows else "<p>None: all settings are the same.</p>"
        page.append(f"<p><b>{heading}</b></p>{shown}")
        text.append(f"{heading}\n{text_table(rows)}")
    for notice in notices(runs):
        page.append(f"<p>{html.escape(notice)}</p>")
        text.append(notice)
    for reason in refused:
        page.append(f"<p>Not read: {html.escape(reason)}</p>")
        text.append(f"Not read: {reason}")
    return {"text/html": "\n".join(page), "text/plain": "\n\n".join(text)}, {}


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
