"""The README and the docs say what is there: their code runs, their files, targets and flags exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_example_runs_as_it_stands() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loss, ratio = re.fullmatch(r"(\d+\.\d\d) (\d+\.\d\d)x fewer bit operations\n", done.stdout).groups()  # type: ignore[union-attr]
    assert 0 < float(loss) < 20
    assert float(ratio) > 3  # 8 of 32 bits in nearly all layers


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
