"""Stands in for a running notebook."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from experiments.notebook import explorers, live


@dataclass
class Screen:
    """What every display shows, in the order in which the displays were made, and every frame that was drawn."""

    displays: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    frames: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)

    def put(self, data: dict[str, Any], metadata: dict[str, Any], *, handle: int | None = None) -> int:
        """As `live.put`: a new display, or another frame of the display `handle`."""
        if handle is None:
            handle = len(self.displays)
            self.displays.append((data, metadata))
        self.displays[handle] = (data, metadata)
        self.frames.append((data, metadata))
        return handle

    def alt(self, place: int) -> str:
        """The alt text of the figure that a display shows."""
        return str(self.displays[place][1]["image/png"]["alt"])

    @property
    def alts(self) -> list[str]:
        """The alt texts of all frames that are figures."""
        return [str(metadata["image/png"]["alt"]) for _, metadata in self.frames if metadata]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Every display of the test goes here."""
    screen = Screen()
    monkeypatch.setattr(live, "put", screen.put)
    return screen


@pytest.fixture
def controls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The controls of the explorers that are shown, by name, to be moved by the test."""
    kept: dict[str, Any] = {}
    explorer = live.explorer

    def keeping(*views: Any, **options: Any) -> None:
        kept.update({name: one for name, one in options.items() if name not in ("busy", "page", "pictures", "helpers")})
        kept["helpers"] = options.get("helpers", ())
        explorer(*views, **options)

    monkeypatch.setattr(live, "explorer", keeping)
    monkeypatch.setattr(explorers, "layer_menus", {})
    return kept
