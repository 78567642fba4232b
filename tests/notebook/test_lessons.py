"""The method's source as the notebook shows it, and what the lessons compute, against what runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from IPython.display import Markdown

import src.quantizer
import src.training
from experiments.figures import plain_table
from experiments.notebook import lessons
from experiments.pipeline import configure, prepare_data


@pytest.mark.parametrize(
    ("shown", "module", "words"),
    [
        (lessons.quantizer_source(), src.quantizer, ("def lay_grids(", "def grid_indices(", "def dequantize(")),
        (lessons.step_source(), src.training, ("def train_step(", "def step_gradients(")),
    ],
)
def test_the_source_that_is_shown_is_the_one_that_runs_with_an_equation_each(
    shown: Markdown, module: object, words: tuple[str, ...]
) -> None:
    codes = re.findall(r"```python\n(.+?)\n```", shown.data, re.DOTALL)
    assert len(codes) == len(re.findall(r"\$\$.+?\$\$", shown.data, re.DOTALL))
    sources = "".join(
        path.read_text()
        for path in Path(str(module.__file__)).parent.glob("*.py")  # type: ignore[attr-defined]
    )
    lines = [line.strip() for line in sources.splitlines()]
    for code in codes:
        compile(code, "shown", "exec")
        assert all(line.strip() in lines for line in code.splitlines())
    assert all(word in shown.data for word in words)


def test_a_draw_of_augmentation_is_a_crop_of_the_padded_image() -> None:
    config, data = prepare_data(configure("smoke", limit=10, device="cpu"))
    draws = lessons.augmentation_draws(data, config, 4)
    assert len(draws) == 4
    for image, seen in zip(data.train_images[:3], draws[0], strict=True):
        padded = F.pad(image, (4, 4, 4, 4))
        crops = [padded[:, top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
        assert any(torch.equal(crop, torch.from_numpy(seen)) for crop in crops)
    assert not all(np.array_equal(draws[0], draw) for draw in draws)


def test_a_folded_table_is_shown_on_a_click() -> None:
    page = lessons.folded("a < b", plain_table([{"layer": "conv1"}])).data
    assert re.fullmatch(r"<details[^>]*><summary>a &lt; b</summary>.*conv1.*</details>", page, re.DOTALL)
