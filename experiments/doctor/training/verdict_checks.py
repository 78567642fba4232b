"""Afterwards: the healthy list of `experiments.pipeline`, each expectation as a finding of the doctor."""

from __future__ import annotations

from experiments.doctor.causes.catalogue import causes
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.report import FAILED, Finding
from experiments.doctor.runner import CheckRunner
from experiments.pipeline import judge
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
    "accuracy recovers": ("accuracy-collapsed", "coefficient-too-large"),
    "no layer dies whole": ("layer-died", "coefficient-too-large"),
}


def verdict_checks(runner: CheckRunner, pipeline: Pipeline, history: History | None) -> None:
    """Add the verdict's findings, where there is a history of the project's own pipeline."""
    config, quantized = pipeline.expected.config, pipeline.expected.quantized
    if history is None or config is None or pipeline.data is None:
        return
    layers = quantized if quantized is not None else history.layer_names
    steps = len(history) * steps_per_epoch(pipeline.data, config.batch_size)
    for found in judge(history, config, pipeline.data.num_classes, layers, steps).expectations:
        failed = found.status == FAILED
        likely = causes(*LIKELY.get(found.name, ())) if failed else ()
        proves = f"a healthy run shows it; otherwise look at {found.look_at}"
        runner.findings.append(
            Finding(found.name, proves, runner.stage, found.expected, found.measured, found.status, likely)
        )
