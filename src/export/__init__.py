"""A trained network for use elsewhere: integer weights, entropy coding, the packed file, ONNX.

Everything written is read back and compared with the network it came from. onnx and onnxruntime are loaded only where
a function of onnx_file.py is asked for: the notebook does without these packages.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from src.export.integer_weights import compact_with_indices
from src.export.packing import PackReport, pack, unpack

if TYPE_CHECKING:
    from src.export.onnx_file import check_onnx, export_onnx, open_session, run_onnx

__all__ = [
    "PackReport",
    "check_onnx",
    "compact_with_indices",
    "export_onnx",
    "open_session",
    "pack",
    "run_onnx",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("src.export.onnx_file"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
