"""What torch.save wrote is read as it was; what asks for more than tensors, numbers and text is not."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from src.storage import load_checked
from tests.torture.harmful import rezipped, torch_file

CONTENT: dict[str, Any] = {
    "model": OrderedDict(w=torch.randn(3, 4).t(), half=torch.ones(2, dtype=torch.bfloat16), none=torch.zeros(0)),
    "numbers": [1, 2.5, None, True, 2**40, "text\nclines\nand more", (1, (2, 3))],
    "empty": {},
}


def test_it_reads_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(torch_file(CONTENT))
    found = load_checked(tmp_path / "file")
    assert list(found) == list(CONTENT)
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in CONTENT["model"].items())
    assert found["numbers"] == CONTENT["numbers"]


def test_a_state_that_was_trained_can_be_read(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    (tmp_path / "file").write_bytes(torch_file([network.state_dict(), optimizer.state_dict()]))
    state, updates = load_checked(tmp_path / "file")
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(updates["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def _named(name: bytes) -> Callable[[str, bytes], bytes]:
    """The pickle replaced by one that builds `name` from nothing."""
    return lambda entry, old: b"\x80\x02c" + name + b"\n)R." if entry.endswith("data.pkl") else old


def _endless(levels: int) -> list[Any]:
    """2^levels lists for whoever walks through it, a few bytes each in the file."""
    content: list[Any] = []
    for _ in range(levels):
        content = [content, content]
    return content


def _in_itself() -> list[Any]:
    content: list[Any] = []
    content.append(content)
    return content


def _twice(data: bytes) -> bytes:
    """The archive with a second entry of the pickle's name, in letters that torch's reader does not tell apart."""
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("archive/DATA.pkl", archive.read("archive/data.pkl"))
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (rezipped(torch_file(CONTENT), lambda name, old: old, zipfile.ZIP_DEFLATED), "claim more bytes"),
        (torch_file({"t": torch.zeros(1).expand(10**6)}), r"shape \(1000000,\) is larger"),
        (torch_file([[torch.zeros(2).expand(3, 2)]]), r"shape \(3, 2\) is larger"),
        (torch_file(Counter("abc")), "collections.Counter, which no checkpoint needs"),
        (torch_file(bytearray(10)), "bytearray, which no checkpoint needs"),
        (torch_file(nn.Parameter(torch.zeros(2))), "_rebuild_parameter, which"),
        (rezipped(torch_file(CONTENT), _named(b"builtins\nset")), "builtins.set, which"),
        (rezipped(torch_file(CONTENT), _named(b"os\nsystem")), "os.system, which"),
        (torch_file({"model": _endless(60)}), "many times as long as the file"),
        (torch_file({"model": _in_itself()}), "many times as long as the file"),
        (_twice(torch_file(CONTENT)), "two entries called 'archive/data.pkl'"),
        (torch_file(CONTENT)[:-30], "not a zip file"),
        (b"", "not a zip file"),
    ],
)
def test_it_refuses(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(zipfile.BadZipFile, match=words):
        load_checked(tmp_path / "file")


def test_torch_reads_what_was_looked_at(tmp_path: Path) -> None:
    """Two archives in one file: Python's zipfile goes by where the directory lies, torch by where it is said to lie."""
    good = torch_file({"numbers": [1, 2, 3]})
    pickled = zipfile.ZipFile(io.BytesIO(good)).read("archive/data.pkl")
    other = b"\x80\x02cbuiltins\nbytearray\nK\x05\x85R.".ljust(len(pickled), b".")
    good = rezipped(good, lambda name, old: old)
    evil = rezipped(good, lambda name, old: other if name.endswith("data.pkl") else old)
    size, start = struct.unpack("<II", good[-10:-2])
    both = evil[: start + size] + good  # whose end says that the directory is where the first archive has it
    (tmp_path / "file").write_bytes(both)
    assert torch.load(tmp_path / "file", weights_only=True) == bytearray(5)
    assert load_checked(tmp_path / "file") == {"numbers": [1, 2, 3]}


def test_a_changed_byte_of_a_tensor_is_noticed(tmp_path: Path) -> None:
    data = bytearray(torch_file({"t": torch.arange(1000.0)}))
    place = data.index(torch.arange(1000.0).numpy().tobytes()[400:500])
    data[place] ^= 1
    (tmp_path / "file").write_bytes(data)
    assert torch.load(tmp_path / "file", weights_only=True)["t"].shape == (1000,)  # torch alone does not notice
    with pytest.raises(zipfile.BadZipFile, match="Bad CRC-32"):
        load_checked(tmp_path / "file")
