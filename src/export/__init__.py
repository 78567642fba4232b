"""A trained network for use elsewhere: integer weights, entropy coding, the packed file, ONNX.

Everything written is read back and compared with the network it came from.
"""

from __future__ import annotations

from src.export.onnx_file import check_onnx, export_onnx, open_session, run_onnx
from src.export.packing import PackReport, pack, unpack

__all__ = ["PackReport", "check_onnx", "export_onnx", "open_session", "pack", "run_onnx", "unpack"]
