"""The README and the docs say what is there: their code runs, their files, targets and flags exist."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from src.data import load_data
from tests.browser.lab_server import serving

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
    assert re.search(r"^epoch 10: loss \d+\.\d\d, test accuracy 100\.0%$", done.stdout, re.MULTILINE), done.stdout
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


# What makes a command short enough for a test. Without a network, digits stand in for CIFAR-10.
SHORTER = {
    "make walkthrough": "EPOCHS=1 LIMIT=60",
    "make debug": "EPOCHS=1 LIMIT=60",
    "python -m experiments.debug_run --resume": "",
    "python -m experiments.debug_run --set warmup_epochs=5": "--epochs 6 --limit 60",
    "python -m experiments.debug_run": "--epochs 1 --limit 60",
    "python -m experiments.sweep": "--set limit=60 --set epochs=1 --set batch_size=20",
    "python -m experiments.bench": "--rounds 1 --batch-sizes 1",
}
NOT_HERE = ("make test", "make test-all", "make walkthrough DATA=cifar10")  # this test again, and a download


def commands() -> list[str]:
    """The commands in the README's blocks, in its order, made short; an export follows the first."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [re.sub(r"\s*#.*", "", line) for block in blocks for line in block.splitlines()]
    found = []
    for line in (line for line in lines if line not in NOT_HERE):
        more = next((words for begin, words in SHORTER.items() if line.startswith(begin)), "")
        found.append(f"{line.replace('DATA=cifar10', 'DATA=digits')} {more}".strip())
    found.insert(1, "python -m experiments.export debug_output")  # of a reader who came for the small network
    return found


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's files alone, with this Python as its virtual environment, and a reader's own images."""
    folder = tmp_path / "project"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    shutil.copy(folder / "requirements.lock", folder / ".venv/installed.lock")
    monkeypatch.setenv("PATH", str(python.parent), prepend=os.pathsep)
    monkeypatch.setenv("BROWSER", "true")
    for number in range(48):
        image = folder / "my_images" / ("train", "test")[number // 32] / "ab"[number % 2] / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 5 * number, 200 * (number % 2))).save(image)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_every_command_runs_in_the_order_in_which_a_reader_runs_them(checkout: Path, tmp_path: Path) -> None:
    """Takes about five minutes: two notebooks, the doctor, and ten trainings of one epoch, in one folder."""
    printed: dict[str, str] = {}
    for command in commands():
        if command == "make lab":
            with serving(command.split(), checkout, tmp_path / "home"):
                continue
        done = subprocess.run(command.split(), cwd=checkout, capture_output=True, text=True, check=False)
        missed = "--target" in command  # no budget is met in one epoch
        assert done.returncode in (0, int(missed)), f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        printed.setdefault(command, done.stdout)
    exported = printed["python -m experiments.export debug_output"]
    assert "model.cdq was there already, the same, and is left as it is" in exported
    assert "Epoch 1/1 | " in printed["make walkthrough EPOCHS=1 LIMIT=60"]


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


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda path: path.stem)
def test_the_help_of_every_command_shows_an_example_and_its_exit_status(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "__main__" not in path.read_text(encoding="utf-8"):
        return
    with pytest.raises(SystemExit):
        importlib.import_module(f"experiments.{path.stem}").main(["--help"])
    shown = capsys.readouterr().out
    assert re.search(rf"^    python -m experiments\.{path.stem}\b[^\[]*$", shown, re.MULTILINE)
    assert "exit status" in shown.lower()


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
