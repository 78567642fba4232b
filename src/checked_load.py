"""Reading a file that torch.save wrote: whole, no larger in memory than on the disk, and without running code from it.

torch.load checks no checksum, unpacks compressed entries of any size, and lets a file ask for byte arrays and views of
any size. So a damaged file could be read with other numbers, and a few bytes could take all memory. Here every entry's
checksum is looked at, entries are refused unless they are stored as they are, and only tensors may be built.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What a dictionary of numbers, text and tensors is built from, and the operations by which a pickle names anything.
_ALLOWED = re.compile(r"torch\.\w+Storage|torch\._utils\._rebuild_tensor_v2|collections\.OrderedDict")
_NAMING = frozenset({"GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"})
_CHUNK = 2**20


def load_checked(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """The contents of the file. Takes about as much memory as the file has bytes, whatever is in it.

    Raises zipfile.BadZipFile for a file that is damaged or that torch.save has not written from numbers, text and
    tensors, OSError where it cannot be read, and what torch.load raises.
    """
    _check_entries(path)
    content = torch.load(path, map_location=device, weights_only=True)
    _check_views(content)
    return content


def _check_entries(path: str | Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        held = sum(entry.file_size for entry in entries)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or held > Path(path).stat().st_size:
            raise zipfile.BadZipFile("its entries claim more bytes than the file has")
        for entry in entries:
            with archive.open(entry) as stream:  # reading to the end compares the checksum
                if entry.filename.endswith("data.pkl"):
                    _check_names(stream.read())
                else:
                    while stream.read(_CHUNK):
                        pass


def _check_names(pickled: bytes) -> None:
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name in _NAMING:
            full = str(argument).replace(" ", ".")
            if not _ALLOWED.fullmatch(full):
                raise zipfile.BadZipFile(f"it asks for {full}, which no checkpoint needs")


def _check_views(content: Any) -> None:
    """A tensor with strides of 0 has any number of elements over a single stored one."""
    if isinstance(content, Tensor):
        if content.numel() * content.element_size() > content.untyped_storage().nbytes():
            raise zipfile.BadZipFile(f"a tensor of shape {tuple(content.shape)} is larger than what is stored of it")
    elif isinstance(content, dict):
        for value in content.values():
            _check_views(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            _check_views(value)
