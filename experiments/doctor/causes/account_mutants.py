"""How figures of compression are usually got wrong: mutants of the account, by what is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from experiments.doctor.causes.explain import Mutant
from experiments.doctor.reference.accounting import FLOAT_BITS, Account, Layer

AccountMutant = Mutant[Account]


def _mutant(key: str, **pieces: Any) -> AccountMutant:
    return Mutant(key, lambda account: replace(account, **pieces))


def _where_quantized(bits: Callable[[Layer], float]) -> Callable[[Layer], float]:
    return lambda layer: bits(layer) if layer.quantized else FLOAT_BITS


def _always(bits: float) -> Callable[[Layer], float]:
    return lambda layer: bits


def _live_parts(layer: Layer) -> float:
    """MACs of the filters that are not dead, over the inputs that are read."""
    zero = layer.weight == 0
    outputs, inputs = (~zero.flatten(1).all(1)).sum(), (~zero.transpose(0, 1).flatten(1).all(1)).sum()
    return float(outputs * inputs) / (zero.shape[0] * zero.shape[1]) * layer.dense


NAMED: dict[str, AccountMutant] = {
    "sparsity of latent weights": _mutant("sparsity-on-latent", weight=lambda layer: layer.latent),
    "sparsity averaged over layers": _mutant("sparsity-wrong", share=lambda values, sizes: values.mean()),
    "dead channels per input": _mutant("dead-per-input", dead=lambda w: (w == 0).transpose(0, 1).flatten(1).all(1)),
    "nearly dead counts as dead": _mutant("dead-wrong", dead=lambda w: (w == 0).flatten(1).double().mean(1) > 0.5),
    "live counted as dead": _mutant("dead-wrong", dead=lambda w: (w != 0).flatten(1).any(1)),
    "bits reported unrounded": _mutant("bits-misreported", bits=lambda layer: layer.rough_bits),
    "bits reported as configured": _mutant("bits-misreported", bits=lambda layer: layer.most_bits),
    "bits without the sign": _mutant("bits-misreported", bits=_where_quantized(lambda layer: layer.bits - 1)),
    "BOPs with the most bits": _mutant("bops-wrong-bits", cost_bits=lambda layer: layer.most_bits),
    "BOPs with unrounded bits": _mutant("bops-wrong-bits", cost_bits=lambda layer: layer.rough_bits),
    "BOPs of the dense network": _mutant("bops-dense-density", paid=lambda layer, macs: float(layer.dense)),
    "BOPs with the weights' bits twice": _mutant("bops-activation-bits", activation=lambda layer: layer.bits),
    "ratios upside down": _mutant("ratio-wrong", ratio=lambda dense, cost: cost / dense),
    "ratios as shares saved": _mutant("ratio-wrong", ratio=lambda dense, cost: 1 - cost / dense),
    "quantized baseline": _mutant("baseline-wrong", dense_bits=lambda layer: layer.bits),
    "baseline of the non-zero weights": _mutant(
        "baseline-wrong", dense=lambda layer: float(layer.weight.count_nonzero()) * layer.pixels
    ),
    "baseline of the quantized layers": _mutant(
        "baseline-wrong", dense=lambda layer: float(layer.dense) if layer.quantized else 0.0
    ),
    "MACs of two operations": _mutant(
        "macs-wrong",
        nonzero=lambda layer: 2.0 * float(layer.weight.count_nonzero()) * layer.pixels,
        left=lambda layer: 2 * layer.left,
        dense=lambda layer: 2.0 * layer.dense,
    ),
    "MACs of larger images": _mutant(
        "macs-wrong",
        nonzero=lambda layer: 4.0 * float(layer.weight.count_nonzero()) * layer.pixels,
        left=lambda layer: 4 * layer.left,
        dense=lambda layer: 4.0 * layer.dense,
    ),
    "MACs without pixels": _mutant("macs-wrong", nonzero=lambda layer: float(layer.weight.count_nonzero())),
    "dead filters counted as removed": _mutant("dead-counted-as-removed", left=_live_parts),
    "nothing removed": _mutant("channels-not-removed", left=lambda layer: float(layer.dense)),
}
for _bits in (32, 16, 8, 4, 2):
    NAMED[f"BOPs with {_bits}-bit weights"] = _mutant("bops-wrong-bits", cost_bits=_where_quantized(_always(_bits)))
    NAMED[f"BOPs with {_bits}-bit activations"] = _mutant("bops-activation-bits", activation=_always(_bits))
MUTANTS = tuple(NAMED.values())
