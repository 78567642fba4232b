"""Before training: is every channel normalised as expected? Mean and deviation are read off the values' spacing."""

from __future__ import annotations

import math

import numpy as np
import torch

from experiments.doctor.data.images import Affine, affine_of, some, triple
from experiments.doctor.data.loader_checks import good_batches
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.runner import CheckRunner, Outcome


def normalisation_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the finding about the normalisation of both parts."""
    proves = "each channel has mean 0 and deviation 1"
    runner.check("normalisation", proves, _normalisation, pipeline, blame="loader-raises")


def _normalisation(pipeline: Pipeline) -> Outcome:
    expected = pipeline.expected
    batches = {"training": good_batches(pipeline, 2)}
    if pipeline.test_batches is not None:
        batches["test"] = some(pipeline.test_batches(pipeline), 2)
    if expected.mean is None or expected.std is None:
        x = torch.cat([b[0] for b in batches["training"]]).double()
        mean, std = float(x.mean()), float(x.std())
        ok = abs(mean) < 3 and 0.05 < std < 5
        return Outcome("mean near 0, deviation near 1", f"mean {mean:.2f}, deviation {std:.2f}", ok, ["not-normalised"])
    meant = Affine(np.array(expected.mean), np.array(expected.std))
    allowed = _allowed(pipeline)
    found = {part: affine_of(torch.cat([b[0] for b in several]), meant) for part, several in batches.items()}
    off = {part: _off(a, meant) for part, a in found.items()}
    measured = "; ".join(
        f"{part}: mean {triple(a.mean)}, std {triple(a.std)}" if a else f"{part}: not an affine map of pixels"
        for part, a in found.items()
    )
    bad = [part for part, miss in off.items() if miss > allowed]
    identity = any(
        a is not None and np.allclose(a.mean, 0, atol=0.01) and np.allclose(a.std, a.std[0]) for a in found.values()
    )
    swapped = any(a is not None and _swapped(a, meant) for a in found.values())
    likely: list[str | None] = ["channels-swapped" if swapped else None, "not-normalised" if identity else None]
    likely += ["train-test-normalised-differently"] if len(bad) == 1 and len(off) == 2 else []
    likely += ["wrong-normalisation"]
    wanted = f"mean {triple(meant.mean)}, std {triple(meant.std)}"
    return Outcome(wanted, measured, not bad, likely, max(off.values()) / allowed)


def _allowed(pipeline: Pipeline) -> float:
    """How far mean (in deviations) and deviation (as a ratio) may be off: 3 %, more where few images define them."""
    data, config = pipeline.data, pipeline.expected.config
    limited = config is not None and config.limit is not None and data is not None and data.name != "cifar10"
    return 0.03 + (2 / math.sqrt(len(data.train_labels)) if limited and data is not None else 0.0)


def _off(found: Affine | None, meant: Affine) -> float:
    if found is None:
        return math.inf
    shift = np.abs(found.mean - meant.mean) / meant.std
    return float(max(shift.max(), np.abs(np.log(found.std / meant.std)).max()))


def _swapped(found: Affine, meant: Affine) -> bool:
    """Whether the deviations are the expected ones from the last channel to the first."""
    return not np.allclose(found.std, meant.std, rtol=0.01) and np.allclose(found.std, meant.std[::-1], rtol=0.01)
