"""Afterwards: the healthy list of `experiments.verdict`, each expectation as a finding of the doctor."""

from __future__ import annotations

from experiments.doctor.causes.causes import causes
from experiments.doctor.core.findings import FAILED, NOT_APPLICABLE, PASSED, Finding
from experiments.doctor.core.subject import Subject
from experiments.doctor.core.ward import Ward
from experiments.pipeline import FAILED as JUDGED_FAILED
from experiments.pipeline import NOT_JUDGED, judge
from src.data import steps_per_epoch
from src.training import History

LIKELY = {
    "layers quantized": ("quantizers-missing", "quantizers-extra"),
    "loss falls": ("labels-shuffled", "learning-rate-too-large"),
    "accuracy climbs": ("stuck-at-chance", "labels-shuffled", "learning-rate-too-large"),
    "accuracy reached": ("penalty-dominates", "too-short"),
    "zeros appear": ("logits-stuck", "logit-squares-missing", "too-short"),
    "channels die": ("penalty-without-batchnorm", "coefficient-never-ramps", "too-short"),
    "bits fall": ("logits-stuck", "logit-squares-missing", "too-short"),
    "nothing collapses": ("accuracy-collapsed", "coefficient-too-large"),
    "no layer dies whole": ("layer-died", "coefficient-too-large"),
}


def verdict_checks(ward: Ward, subject: Subject, history: History | None) -> None:
    """Add the verdict's findings, where there is a history of the project's own pipeline."""
    config, promise = subject.promise.config, subject.promise
    if history is None or config is None or subject.data is None:
        return
    expected = promise.quantized if promise.quantized is not None else history.layer_names
    steps = len(history) * steps_per_epoch(subject.data, config.batch_size)
    for found in judge(history, config, subject.data.num_classes, expected, steps).findings:
        failed = found.status == JUDGED_FAILED
        status = FAILED if failed else NOT_APPLICABLE if found.status == NOT_JUDGED else PASSED
        likely = causes(*LIKELY.get(found.name, ())) if failed else ()
        proves = f"a healthy run shows it; otherwise look at {found.look_at}"
        ward.findings.append(Finding(found.name, proves, ward.stage, found.expected, found.measured, status, likely))
