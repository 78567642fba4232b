"""Whole numbers around zero as a stream of bits near their entropy, with constriction's range coder.

Quantized weights are many zeros and a few large values, as often negative as positive. So what is coded per layer is

    a table     how often each magnitude occurs, on a scale of 4 levels per doubling (within 9 %, which costs 0.003 bits
                a weight), as differences between neighbours under a fixed model
    magnitudes  |q| under the model that the table gives
    signs       one bit for each weight that is not zero

All models are made of whole numbers, so that every machine decodes the same. A stream is uint32 words.
Axis letters: n weights of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int32]
Words = NDArray[np.uint32]

_queue, _model = constriction.stream.queue, constriction.stream.model
# 0, then 4 whole numbers per doubling where there are so many: 1 2 3 4 5 6 7 8 10 11 13 16 19 ...
_LEVELS = np.unique([0] + [round(2 ** (k / 4)) for k in range(4 * 30)]).astype(np.int64)


def encode(layers: Sequence[tuple[int, Integers]]) -> Words:
    """(bits, q) of every layer -> one stream. q: int32 (n,), |q| <= 2^(bits - 1) - 1, n >= 1."""
    encoder = _queue.RangeEncoder()
    for bits, q in layers:
        magnitude = np.abs(q)
        codes = _codes(np.bincount(magnitude, minlength=2 ** (bits - 1)))
        steps = np.diff(codes, prepend=0)
        encoder.encode(np.where(steps >= 0, 2 * steps, -2 * steps - 1).astype(np.int32), _TABLE_MODEL)
        encoder.encode(magnitude, _magnitudes(codes))
        encoder.encode((q[magnitude > 0] < 0).astype(np.int32), _model.Uniform(2))
    return np.asarray(encoder.get_compressed(), dtype=np.uint32)


def decode(words: Words, layers: Sequence[tuple[int, int]]) -> list[Integers]:
    """A stream that `encode` wrote and (bits, n) of every layer -> q of every layer, int32 (n,)."""
    decoder = _queue.RangeDecoder(words)
    return [_decode_layer(decoder, bits, count) for bits, count in layers]


def _decode_layer(decoder: Any, bits: int, count: int) -> Integers:
    steps = decoder.decode(_TABLE_MODEL, 2 ** (bits - 1))
    codes = np.cumsum(np.where(steps % 2, -(steps + 1) // 2, steps // 2))
    q: Integers = decoder.decode(_magnitudes(codes), count)
    outside = q > 0
    q[outside] *= 1 - 2 * decoder.decode(_model.Uniform(2), int(outside.sum()))
    return q


def entropy_bits(q: NDArray[np.integer]) -> float:
    """Order-0 entropy of n whole numbers, in bits altogether: -sum over values of count log2(count / n)."""
    counts = np.unique(q, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def _codes(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The level nearest to each count; a count above 0 never becomes 0."""
    above = np.searchsorted(_LEVELS, counts).clip(max=len(_LEVELS) - 1)
    below = (above - 1).clip(min=0)
    nearer = np.where(_LEVELS[above] - counts <= counts - _LEVELS[below], above, below)
    return np.where(counts > 0, nearer.clip(min=1), 0)


def _magnitudes(codes: NDArray[np.int64]) -> Any:
    return _model.Categorical(_LEVELS[codes].astype(np.float32), perfect=False)


def _table_model() -> Any:
    """Differences 0, -1, 1, -2, 2, ... of neighbouring table entries: 4/5 as likely with every step away from 0."""
    likely, weights = 1_000_000, []
    for _ in range(len(_LEVELS)):
        weights += [likely, likely]
        likely = max(1, likely * 4 // 5)
    return _model.Categorical(np.array(weights, dtype=np.float32), perfect=False)


_TABLE_MODEL = _table_model()
