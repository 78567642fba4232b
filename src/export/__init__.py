"""A trained network for use elsewhere: integer weights, the packed file, ONNX, int8.

Everything written is read back and compared with the network it came from. onnx and onnxruntime are loaded only where
a function of onnx_file.py or int8.py is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from src.export.integer_weights import compact_with_indices
from src.export.packing import PackReport, pack, unpack

if TYPE_CHECKING:
    from src.export.int8 import export_int8, int8_instructions, quantized_onnx
    from src.export.onnx_file import check_onnx, export_onnx, open_session, run_onnx

__all__ = [
    "PackReport",
    "check_onnx",
    "compact_with_indices",
    "export_int8",
    "export_onnx",
    "int8_instructions",
    "open_session",
    "pack",
    "quantized_onnx",
    "run_onnx",
    "unpack",
]
INT8 = ("export_int8", "int8_instructions", "quantized_onnx")


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"src.export.{'int8' if name in INT8 else 'onnx_file'}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
