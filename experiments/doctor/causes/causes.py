"""What can be wrong with a pipeline, by key: a sentence and a remedy each. Checks rank these by their evidence.

The sentences are in causes_of_building.py, causes_of_training.py and causes_of_measuring.py.
"""

from __future__ import annotations

from experiments.doctor.causes import causes_of_building, causes_of_measuring, causes_of_training
from experiments.doctor.core.findings import Cause

_TEXTS = {**causes_of_building.TEXTS, **causes_of_training.TEXTS, **causes_of_measuring.TEXTS}

CAUSES = {key: Cause(key, *texts) for key, texts in _TEXTS.items()}


def causes(*keys: str | None) -> tuple[Cause, ...]:
    """The causes with these keys, in this order, each once; None is left out."""
    return tuple(CAUSES[key] for key in dict.fromkeys(key for key in keys if key))
