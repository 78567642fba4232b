"""docs/measured/networks.md: how far every network comes. Text from rows, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from tests.zoo.walk import STEPS

INTRODUCTION = """# Networks of others

Written by `make networks`, which leads every network through the whole path with random weights, and checks every step
against something computed another way; [../networks.md](../networks.md) says what the steps are.
"""
WRONG = ("wrong", "error")


@dataclass(frozen=True)
class Row:
    """One network. steps: the outcome of each step. channels: outputs of all layers but the scores'.

    peer_share, peer_whole, peer_filters: what Torch-Pruning does, see tests/zoo/peer.py.
    """

    family: str
    name: str
    channels: int
    share: float | None
    steps: Mapping[str, str]
    peer_share: float | None
    peer_whole: str
    peer_filters: str

    @property
    def faults(self) -> list[str]:
        return [f"{step}: {found}" for step, found in self.steps.items() if found.startswith(WRONG)]

    @property
    def as_wide(self) -> bool:
        """Compacted exactly, with half of the channels in groups if Torch-Pruning has half of them."""
        return self.steps["compaction"] == "ok" and ((self.share or 0) >= 0.5 or (self.peer_share or 0) < 0.5)


def page(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """The page as Markdown."""
    notes: list[str] = []
    families = dict.fromkeys(row.family for row in rows)
    parts = [INTRODUCTION, _summary(rows, versions)]
    parts += [_table(family, [row for row in rows if row.family == family], notes) for family in families]
    parts += ["\n".join(["## Notes", "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _summary(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    count, public = len(rows), [row for row in rows if row.family != "hand-made"]
    shared = [row for row in public if row.share is not None and row.peer_share is not None]
    torchvision = [row for row in rows if row.family == "torchvision"]
    lines = [
        "## Result",
        "",
        f"- {sum(len(row.faults) for row in rows)} of {count * len(STEPS)} steps with a wrong result or an error of "
        "another library",
        f"- {_ok(rows, 'compaction')} of {count} networks compacted exactly, {_ok(rows, 'packed file')} packed and "
        f"read back bit for bit, {_ok(rows, 'ONNX')} exported to ONNX",
        f"- {sum(row.as_wide for row in torchvision)} of torchvision's {len(torchvision)} compacted exactly, with half "
        "of their channels in groups wherever Torch-Pruning has that",
        f"- mean share of channels in groups: {mean(row.share or 0 for row in shared):.2f} here, "
        f"{mean(row.peer_share or 0 for row in shared):.2f} in Torch-Pruning ({len(shared)} of torchvision and timm)",
        f"- Torch-Pruning removes channels exactly from {_exact(rows, 'peer_whole')} of {count} networks where all "
        f"that belongs to them is zero, and from {_exact(rows, 'peer_filters')} where only their filters are",
        f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
    ]
    return "\n".join(lines)


def _ok(rows: Sequence[Row], step: str) -> int:
    return sum(row.steps[step].startswith("ok") for row in rows)


def _exact(rows: Sequence[Row], column: str) -> int:
    return sum(getattr(row, column) == "exact" for row in rows)


def _table(family: str, rows: Sequence[Row], notes: list[str]) -> str:
    peer = ("T-P: in groups", "T-P: all zero", "T-P: filters zero")
    names = ("network", "channels", "in groups", *list(STEPS)[1:], *peer)
    lines = [f"## {family}", "", _line(names), "|" + " --- |" * len(names)]
    for row in rows:
        steps = [_cell(row.steps[step], notes) for step in STEPS if step != "groups"]
        groups = _cell(row.steps["groups"], notes) if row.share is None else f"{row.share:.2f}"
        theirs = "" if row.peer_share is None else f"{row.peer_share:.2f}"
        others = [_cell(found, notes) for found in (row.peer_whole, row.peer_filters)]
        lines.append(_line([row.name, f"{row.channels:,}", groups, *steps, theirs, *others]))
    return "\n".join(lines)


def _cell(found: str, notes: list[str]) -> str:
    """ "ok" as it is; of anything longer the first word, and the number of the note that has the rest."""
    word, _, rest = found.partition(": ")
    if not rest or word == "changed":
        return word
    note = " ".join(rest.split()).replace("|", "\\|").replace("<", "\\<")
    note = note if len(note) <= 300 else note[:297] + "..."
    if note not in notes:
        notes.append(note)
    word = f"**{word}**" if word in WRONG else word
    return f"{word} ({notes.index(note) + 1})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
