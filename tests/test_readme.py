"""The README and the docs say what is there: their code runs, their files, targets and flags exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from src.data import load_data

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


RED, BLUE = (220, 30, 30), (30, 30, 220)


def picture(colour: tuple[int, int, int], around: tuple[int, int, int], size: tuple[int, int]) -> Image.Image:
    """The centre square in one colour, and what lies outside it in another."""
    image, side = Image.new("RGB", size, around), min(size)
    image.paste(Image.new("RGB", (side, side), colour), ((size[0] - side) // 2, (size[1] - side) // 2))
    return image


def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    """Takes seconds. The ONNX file tells colours apart by the centre square, whatever the size of the images."""
    sizes = [(32, 32), (20, 20), (96, 40), (40, 120), (64, 48)]
    for name, colour, around in (("blue", BLUE, RED), ("red", RED, BLUE)):
        for part, count in (("train", 30), ("test", 10)):
            (tmp_path / "my_images" / part / name).mkdir(parents=True)
            for number in range(count):
                image = picture(colour, around, sizes[number % len(sizes)])
                image.save(tmp_path / "my_images" / part / name / f"{number}.png")
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", example]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^epoch 20: loss \d+\.\d\d, test accuracy 100\.0%$", done.stdout, re.MULTILINE), done.stdout
    fewer = re.search(r"^(\d+\.\d\d) times fewer multiply-adds$", done.stdout, re.MULTILINE)
    assert fewer is not None
    assert float(fewer.group(1)) >= 1
    assert "on 20 images: 0 predictions differ" in done.stdout
    data = load_data(f"folder:{tmp_path / 'my_images'}")
    colours = np.array([BLUE, RED], dtype=np.float32)[:, :, None, None] * np.ones((1, 1, 32, 32), dtype=np.float32)
    mean, std = (np.array(each, dtype=np.float32)[:, None, None] for each in (data.mean, data.std))
    session = onnxruntime.InferenceSession(str(tmp_path / "my_network.onnx"))
    (logits,) = session.run(None, {"images": (colours / 255 - mean) / std})
    assert [data.class_names[best] for best in logits.argmax(1)] == ["blue", "red"]


def test_every_file_in_the_layout_exists() -> None:
    layout = README.split("## Layout")[1].split("## ")[0]
    named = [
        name for row in re.findall(r"^\| (`.*?) \|", layout, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
    ]
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_exists(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")) if ":" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_and_command_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE))
    assert {target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()
    modules = set(re.findall(r"python -m (experiments\.\w+)", text))
    assert {name for name in modules if not _sources(name)} == set()
    flags = {
        (name, flag)
        for name, rest in re.findall(r"python -m (experiments\.\w+)([^`\n|]*)", text)
        for flag in re.findall(r"--[a-z0-9-]+", rest)
    }
    for name, flag in flags:
        assert f'"{flag}"' in _sources(name), f"{page.name}: {name} has no {flag}"


def _sources(name: str) -> str:
    """The source of a command: one file, or a package with a `__main__`. Empty where there is none."""
    command = ROOT / name.replace(".", "/")
    if command.with_suffix(".py").exists():
        return command.with_suffix(".py").read_text(encoding="utf-8")
    return "".join(path.read_text(encoding="utf-8") for path in command.glob("*.py"))


def test_the_console_lines_shown_have_the_form_that_is_printed() -> None:
    shown = re.findall(r"^Epoch .*$", README, re.MULTILINE)
    form = r"Epoch +\d+/\d+ \| Loss: \d+\.\d\d \| Acc: \d+\.\d% \| Unstr: \d+\.\d% \| Struct: \d+\.\d% \| Bits: \d\.\d"
    assert len(shown) >= 3
    assert all(re.fullmatch(form, line) for line in shown)
