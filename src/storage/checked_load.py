"""Reading a file that torch.save wrote: whole, no larger in memory than on the disk, and without running code from it.

torch.load checks no checksum, unpacks compressed entries of any size, finds entries in another way than Python's
zipfile does, and lets a file ask for byte arrays and views of any size. So a damaged file could be read with other
numbers, and a few bytes could take all memory. Here every entry's checksum is looked at, entries are refused unless
they are stored as they are, only tensors, numbers and text may be built, and torch is handed a fresh archive of
exactly the entries that were looked at.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What a dictionary of numbers, text and tensors is built from, and the operations by which a pickle names anything.
_ALLOWED = re.compile(r"torch\.\w+Storage|torch\._utils\._rebuild_tensor_v2|collections\.OrderedDict")
_NAMING = frozenset({"GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"})
_WRITTEN_OUT = 16  # times the file's size: no state that a run writes comes near it


def load_checked(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """The contents of the file. Takes a few times the memory that the file has bytes, whatever is in it.

    Raises zipfile.BadZipFile for a file that is damaged or that torch.save has not written from numbers, text and
    tensors, OSError where it cannot be read, and what torch.load raises.
    """
    content = torch.load(_checked_copy(path), map_location=device, weights_only=True)
    _check_contents(content, _WRITTEN_OUT * Path(path).stat().st_size)
    return content


def _checked_copy(path: str | Path) -> BytesIO:
    copy, seen = BytesIO(), set()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as checked:
        entries = archive.infolist()
        held = sum(entry.file_size for entry in entries)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or held > Path(path).stat().st_size:
            raise zipfile.BadZipFile("its entries claim more bytes than the file has")
        for entry in entries:
            name, data = entry.filename.lower(), archive.read(entry)  # reading compares the checksum
            if name in seen:
                raise zipfile.BadZipFile(f"it has two entries called {name!r}")
            seen.add(name)
            if name.endswith("data.pkl"):
                _check_names(data)
            checked.writestr(entry.filename, data)
    copy.seek(0)
    return copy


def _check_names(pickled: bytes) -> None:
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name in _NAMING:
            full = str(argument).replace(" ", ".")
            if not _ALLOWED.fullmatch(full):
                raise zipfile.BadZipFile(f"it asks for {full}, which no checkpoint needs")


def _check_contents(content: Any, most: int) -> None:
    """Refuse what is small in the file and large once it is used.

    A tensor with strides of 0 has any number of elements over a single stored one. A list that holds another one twice,
    which does the same, ..., or that holds itself, has no end for whoever walks through it.
    """
    waiting, length = [content], 0
    while waiting:
        value = waiting.pop()
        length += 1
        if isinstance(value, Tensor):
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise zipfile.BadZipFile(f"a tensor of shape {tuple(value.shape)} is larger than what is stored of it")
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, (str, bytes)):
            length += len(value)
        if length > most:
            raise zipfile.BadZipFile("written out, its contents are many times as long as the file")
