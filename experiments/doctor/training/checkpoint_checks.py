"""Afterwards: does the checkpoint give back the network, and all that a run needs to go on? Axis letters: N images."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from experiments.doctor.pipeline import Pipeline
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, names, preserve_state
from experiments.doctor.training.reported import Reported, equal_tensors
from src.runs import contradictions, load_checkpoint
from utils_quantization import eval_mode


def checkpoint_checks(runner: CheckRunner, pipeline: Pipeline, reported: Reported) -> None:
    """Add the findings about the checkpoint."""
    blame = {"blame": "checkpoint-incomplete"}
    proves = "it gives back the network of the history's last epoch"
    runner.check("checkpoint", proves, _checkpoint, pipeline, reported, **blame)
    runner.check("going on", "it holds all that a run needs to go on", _going_on, pipeline, reported, **blame)


def _checkpoint(pipeline: Pipeline, reported: Reported) -> Outcome:
    if reported.checkpoint is None:
        raise NotApplicable("there is no checkpoint")
    state = load_checkpoint(reported.checkpoint)
    saved, own = cast(dict[str, Tensor], state["model"]), pipeline.model.state_dict()
    parts: list[str] = []
    likely: list[str | None] = []
    missing = sorted(own.keys() ^ saved.keys())
    differing = [name for name in own.keys() & saved.keys() if not equal_tensors(own[name], saved[name])]
    if missing:
        parts.append(f"{names(missing)} missing or unknown")
        likely.append("checkpoint-incomplete")
    if differing:
        parts.append(f"{len(differing)} of {len(own)} tensors differ from the network's")
        rounded = all(_nearly(own[name], saved[name]) for name in differing)
        other = len(differing) > len(own) / 2 and not rounded
        likely.append("checkpoint-of-other-epoch" if other else "checkpoint-incomplete")
    if reported.history is not None and reported.history.records:
        last, epoch = reported.history.records[-1].epoch, state.get("epoch")
        kept = [entry.get("epoch") for entry in state["history"].get("records", [])]
        if epoch is not None and epoch != len(reported.history.records):
            parts.append(f"it says epoch {epoch}, the history ends with {last}")
            likely.append("checkpoint-of-other-epoch")
        elif kept and kept[-1] != last:
            parts.append(f"its history ends with epoch {kept[-1]}, not {last}")
            likely.append("history-shifted")
    if not parts and pipeline.fresh is not None:
        parts += _restored(pipeline, saved)
        likely.append("checkpoint-incomplete")
    measured = "; ".join(parts) or f"all {len(own)} tensors, and the same outputs"
    return Outcome("every tensor as it is", measured, not parts, [*likely, "checkpoint-of-other-epoch"])


def _nearly(left: Tensor, right: Tensor) -> bool:
    """Whether the two differ by no more than half precision rounds."""
    if left.shape != right.shape or not left.is_floating_point():
        return False
    return bool(((left.cpu() - right.cpu()).abs() <= 8e-3 * left.cpu().abs() + 1e-6).all())


def _restored(pipeline: Pipeline, saved: dict[str, Tensor]) -> list[str]:
    """Whether a fresh network with the checkpoint's tensors gives the same outputs."""
    assert pipeline.fresh is not None
    with preserve_state(pipeline):
        again = pipeline.fresh()
    again.load_state_dict(saved)
    images = _first_test_images(pipeline, 32)
    if images is None:
        return []
    with torch.no_grad(), eval_mode(pipeline.model):
        again = again.to(images.device).eval()
        difference = float((again(images) - pipeline.model(images)).abs().max())
    return [] if difference < 1e-4 else [f"a fresh network with it gives other outputs, by {difference:.2g}"]


def _first_test_images(pipeline: Pipeline, count: int) -> Tensor | None:
    if pipeline.test_batches is None:
        return None
    for images, _ in pipeline.test_batches(pipeline):
        return images[:count].to(pipeline.device)
    return None


def _going_on(pipeline: Pipeline, reported: Reported) -> Outcome:
    """Optimizer, records and configuration of the checkpoint beside those of the run that has just ended."""
    if reported.checkpoint is None:
        raise NotApplicable("there is no checkpoint")
    state = load_checkpoint(reported.checkpoint)
    parts: list[str] = []
    own = getattr(pipeline.optimizer, "state", None)
    if own and "optimizer" in state and not _alike(pipeline.optimizer.state_dict(), state["optimizer"]):
        parts.append("the optimizer's state is another one")
    if own and pipeline.expected.config is not None and "config" in state:
        odd = contradictions(state["config"], asdict(pipeline.expected.config))
        parts += [f"the configuration differs in {names(odd)}"] if odd else []
    if reported.history is not None and "records" in state.get("history", {}):
        records, saved = [asdict(record) for record in reported.history.records], state["history"]["records"]
        odd = [str(n) for n, (a, b) in enumerate(zip(records, saved, strict=False), 1) if not _alike(a, b)]
        parts += [f"the record of epoch {names(odd)} is another one"] if odd else []
        parts += [f"{len(saved)} records for {len(records)}"] if len(saved) != len(records) else []
    measured = "; ".join(parts) or "optimizer, records and configuration are those of the run"
    return Outcome("optimizer, records, configuration", measured, not parts, ["checkpoint-not-resumable"])


def _alike(left: Any, right: Any) -> bool:
    """Equal, whatever the containers: tuples are lists, keys are read as text, NaN is NaN."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        same_kind = isinstance(left, Tensor) and isinstance(right, Tensor)
        return equal_tensors(left, right) if same_kind else float(left) == float(right)
    if isinstance(left, dict) and isinstance(right, dict):
        a, b = ({str(key): value for key, value in held.items()} for held in (left, right))
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_alike, left, right))
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return bool(left == right)
