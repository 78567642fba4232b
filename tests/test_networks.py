"""Networks that nobody here wrote go the whole path: every step right, or refused in words of this project.

The steps and their oracles are in tests/zoo/walk.py. The hand-made networks have one topology each, and their removable
channels are counted by hand; torchvision's and timm's, marked slow, have random weights.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.zoo.__main__ import CASES, PAGE
from tests.zoo.handmade import HANDMADE
from tests.zoo.page import Row, page
from tests.zoo.public import TIMM, TORCHVISION
from tests.zoo.walk import STEPS, walk

# What cannot be rebuilt from data alone has no ONNX file; all else can be refused nowhere.
MAY_REFUSE = {"ONNX", "packed file"}
# The largest are on the page alone.
LARGE = {"resnext50_32x4d", "vit_b_16"}
FEWER = ("lcnet_050", "tinynet_e", "ghostnet_050", "rexnet_100", "regnety_002", "convnext_atto", "edgenext_xx_small")
FEWER += ("vit_tiny_patch16_224", "ese_vovnet19b_slim", "skresnet18", "resnest14d", "res2net50_26w_4s")


@pytest.mark.parametrize("name", HANDMADE)
def test_one_network_of_each_topology(name: str, tmp_path: Path) -> None:
    walker, found = walk(HANDMADE[name], tmp_path)
    assert {step: said for step, said in found.items() if said != "ok" and step not in MAY_REFUSE} == {}
    assert {step: said for step, said in found.items() if not said.startswith(("ok", "refused"))} == {}
    assert walker.groups is not None
    assert len(walker.groups) == HANDMADE[name].groups


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name in TORCHVISION if name not in LARGE])
def test_torchvision(name: str, tmp_path: Path) -> None:
    _, found = walk(TORCHVISION[name], tmp_path)
    assert {step: said for step, said in found.items() if not said.startswith(("ok", "refused"))} == {}
    assert found["compaction"] == "ok"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FEWER)
def test_timm(name: str, tmp_path: Path) -> None:
    _, found = walk(TIMM[name], tmp_path)
    assert {step: said for step, said in found.items() if not said.startswith(("ok", "refused"))} == {}
    assert found["compaction"] == "ok"


def test_the_page_counts_faults_and_keeps_their_messages() -> None:
    fine = dict.fromkeys(STEPS, "ok")
    broken = fine | {
        "MACs": "wrong: 2 said, 3 | 4 counted",
        "ONNX": "refused: no softmax",
        "state": "error: KeyError: 'a'",
    }
    rows = [
        Row("torchvision", "one", 8, 0.75, fine, 1.0, "exact", "changed: 3e+00"),
        Row("torchvision", "two", 8, 0.25, broken, 0.5, "error: RuntimeError: no", "exact"),
    ]
    text = page(rows, {"torch": "2"})
    assert f"- 2 of {2 * len(STEPS)} steps with a wrong result" in text
    assert "- 1 of torchvision's 2 compacted exactly" in text
    assert "here, 0.75 in Torch-Pruning" in text
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    (cells,) = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "| two |" in line)
    assert [notes[cell.rstrip(")").split("(")[1]] for cell in cells if "(" in cell] == [
        "2 said, 3 \\| 4 counted", "KeyError: 'a'", "no softmax", "RuntimeError: no",
    ]  # fmt: skip
    assert [cell for cell in cells if cell.startswith("**")] == ["**wrong** (1)", "**error** (2)", "**error** (4)"]


def test_the_page_that_is_committed_has_every_network_and_no_fault() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    named = [cells for cells in rows if cells[0].strip() not in ("network", "---")]
    assert [cells[0].strip() for cells in named] == [name for _, name, _ in CASES.values()]
    faulty = {cells[0].strip() for cells in named if any("**" in cell for cell in cells[:-3])}
    assert faulty == set()
