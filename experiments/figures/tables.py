"""Tables in the style of the figures: text to the left, results coloured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pandas as pd
from pandas.io.formats.style import Styler

from experiments.figures.style import GREEN, VERMILLION, wash


def result_css(status: str) -> str:
    """How a table shows what passed and what failed, in both themes."""
    looks = {
        "passed": f"background-color: {wash(GREEN)}",
        "FAILED": f"background-color: {wash(VERMILLION)}; font-weight: bold",
    }
    return looks.get(status, "")


def plain_table(rows: Iterable[Mapping[str, object]]) -> Styler:
    """A small table of texts, a mapping from column to text for each row."""
    return left_aligned(pd.DataFrame(list(rows)))


def names_left(styled: Styler) -> Styler:
    """The first column of a table of numbers, which says what they are numbers of, starts at the left."""
    styled = styled.set_properties(subset=[styled.columns[0]], **{"text-align": "left"})
    return styled.set_table_styles([{"selector": "th.col0", "props": "text-align: left"}], overwrite=False)


def left_aligned(table: pd.DataFrame) -> Styler:
    """A table of texts, without row numbers."""
    styled = table.style.hide(axis="index").set_properties(**{"text-align": "left"})
    return styled.set_table_styles([{"selector": "th", "props": "text-align: left"}])
