"""Sliders and menus, or what takes their place in a kernel that has no ipywidgets: figures are shown all the same."""

from __future__ import annotations

from typing import Any

NOTE = "(the controls of this figure need the package ipywidgets: %pip install ipywidgets, then restart)"


def widgets() -> Any:
    """The module ipywidgets, or stand-ins under the same names whose value never changes."""
    try:
        import ipywidgets
    except ImportError:
        return _StandIns()
    return ipywidgets


class FixedControl:
    """A control that keeps the value it was made with. Shown, it says what is missing."""

    def __init__(self, *_: Any, value: Any = None, options: Any = (), **__: Any) -> None:
        choices = [one[1] if isinstance(one, tuple) else one for one in options]
        self.value = value if value is not None or not choices else choices[0]
        self.options = options

    def has_trait(self, name: str) -> bool:
        return name == "value"

    def observe(self, *_: Any, **__: Any) -> None:
        """Nothing ever changes."""

    def __repr__(self) -> str:
        return NOTE


class _StandIns:
    def __getattr__(self, name: str) -> type[FixedControl]:
        if not name[:1].isupper():
            raise AttributeError(f"ipywidgets is not installed, and nothing stands in for its {name}")
        return FixedControl
