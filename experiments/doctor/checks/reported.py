"""Afterwards: everything that was reported, a second time and in another way; and what a run needs to go on.

What a short run leaves equal (no dead filter, one bit width) is told apart on a copy that is disturbed on purpose. Axis
letters: N test images, O output channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.doctor.causes.catalogue import causes
from experiments.doctor.observe import Norm, equal_tensors
from experiments.doctor.pipeline import Pipeline, is_plain, run_test_batches
from experiments.doctor.reference.accounting import disturb_
from experiments.doctor.report import FAILED, Finding
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, PartFailed, names, preserve_state, reseed
from experiments.doctor.training.records import (
    ACCURACY_CLOSE,
    LOSS_CLOSE,
    EpochView,
    accuracy_by_hand,
    compression_outcome,
    few_right,
    noise,
)
from experiments.evaluator import EvalResult
from experiments.pipeline import judge
from src.data import steps_per_epoch
from src.runs import contradictions, load_checkpoint
from src.training import EpochMeans, EpochRecord, History, Step, StepLosses
from utils_quantization import FakeQuantParametrization, eval_mode, quantized_layers

STRESS_IMAGES = 96
OTHER_SEED = 20_251
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


@dataclass
class Seen:
    """What passed through the network while it was measured."""

    images: int = 0
    training: bool = False
    quantizers_off: bool = False

    def keys(self, count: int) -> list[str]:
        """What is odd about it, for a test set of `count` images."""
        keys = ["quantizers-off-in-evaluation"] if self.quantizers_off else []
        keys += ["evaluation-in-training-mode"] if self.training else []
        return keys + (["partial-test-set"] if 0 < self.images < count else [])


@dataclass
class Reported:
    """The figures under test. checkpoint: of the last epoch; history: all records; result, accuracy: the evaluation."""

    checkpoint: Path | None = None
    history: History | None = None
    result: EvalResult | None = None
    accuracy: float | None = None
    seen: Seen | None = None
    changed: bool = False
    error: PartFailed | None = None

    @property
    def last(self) -> EpochRecord:
        """The last record. Raises NotApplicable without one."""
        if self.history is None or not self.history.records or is_plain(self.history.records[-1]):
            raise NotApplicable("no record of an epoch is made")
        return self.history.records[-1]


def reported_checks(runner: CheckRunner, pipeline: Pipeline, reported: Reported) -> None:
    """Add the findings about what was reported. The network is the one that training left."""
    if pipeline.evaluate is not None and reported.result is None:
        _evaluate(pipeline, reported)
    proves, blame = "it gives back the network of the history's last epoch", {"blame": "checkpoint-incomplete"}
    runner.check("checkpoint", proves, _checkpoint, pipeline, reported, **blame)
    runner.check("going on", "it holds all that a run needs to go on", _going_on, pipeline, reported, **blame)
    runner.check("last record", "sparsity, dead filters and bits, counted again", _last_record, pipeline, reported)
    runner.check("test accuracy", "the share of right answers, counted by hand", _accuracy, pipeline, reported)
    runner.check("whole test set", "every test image, in eval mode, quantizers on", _whole, pipeline, reported)
    runner.check("evaluation repeats", "twice the same figures, and nothing changed", _repeats, pipeline, reported)
    runner.check("reported compression", "MACs and BOPs of the trained network", _compression, pipeline, reported)
    runner.check("measuring", "records of a copy disturbed on purpose are right", _stressed_record, pipeline)
    runner.check(
        "compression", "MACs and BOPs of a copy disturbed on purpose are right", _stressed_compression, pipeline
    )
    _verdict(runner, pipeline, reported.history)


def _evaluate(pipeline: Pipeline, reported: Reported) -> None:
    assert pipeline.evaluate is not None
    before = state_of(pipeline.model)
    with watching(pipeline.model) as reported.seen:
        try:
            reported.result, reported.accuracy = pipeline.evaluate(pipeline)
        except Exception as error:
            reported.error = PartFailed("measure-raises", error)
    reported.changed = not same_state(before, state_of(pipeline.model))


@contextmanager
def watching(model: nn.Module) -> Iterator[Seen]:
    """Count the images that pass, and note BatchNorm in training mode and quantizers that are off."""
    seen = Seen()

    def look(module: nn.Module, inputs: Any) -> None:
        if module is model and inputs and isinstance(inputs[0], Tensor) and not isinstance(inputs[0], torch.fx.Proxy):
            seen.images += len(inputs[0])
        seen.training |= isinstance(module, Norm) and module.training
        seen.quantizers_off |= isinstance(module, FakeQuantParametrization) and not module.enabled

    watched = [m for m in model.modules() if m is model or isinstance(m, (Norm, FakeQuantParametrization))]
    handles = [module.register_forward_pre_hook(look) for module in watched]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same names and equal tensors, bit for bit."""
    return left.keys() == right.keys() and all(equal_tensors(left[name], right[name]) for name in left)


def _last_record(pipeline: Pipeline, reported: Reported) -> Outcome:
    record = reported.last
    if not quantized_layers(pipeline.model):
        raise NotApplicable("no layer is quantized")
    fault, likely = EpochView.of(pipeline, record).fault(pipeline)
    zeros, dead = 100 * record.unstructured_sparsity, 100 * record.structured_sparsity
    measured = fault or f"{zeros:.2f}% zeros, {dead:.2f}% dead, {record.mean_bits:.2f} bits"
    return Outcome("as counted on the network", measured, not fault, [*likely, "report-wrong"])


def _accuracy(pipeline: Pipeline, reported: Reported) -> Outcome:
    parts: list[str] = []
    likely: list[str] = []
    worst = 0.0
    told: list[tuple[str, float, float | None, torch.dtype]] = []
    if reported.history is not None and reported.history.records and pipeline.measure is not None:
        record = reported.history.records[-1]
        loss = None if math.isnan(record.test_loss) else record.test_loss
        told.append(("recorded", record.accuracy, loss, pipeline.precision))
    if reported.accuracy is not None:
        told.append(("reported in float32", reported.accuracy, None, torch.float32))
    for how, accuracy, loss, precision in told:
        right, count, mean = accuracy_by_hand(pipeline, precision)
        off = abs(accuracy - right / count) / (ACCURACY_CLOSE[precision] + 0.5 / count)
        loss_off = 0.0 if loss is None else abs(loss - mean) / max(mean, 0.05) / LOSS_CLOSE[precision]
        parts.append(f"{100 * accuracy:.2f}% {how}, {100 * right / count:.2f}% counted")
        parts += [f"test loss {loss:.4f} recorded, {mean:.4f} counted"] if loss_off > 1 else []
        worst = max(worst, off, loss_off)
        if max(off, loss_off) > 1:
            seen = reported.seen.keys(count) if how != "recorded" and reported.seen else []
            again = _accuracy_diagnosis(pipeline, accuracy) if how == "recorded" else []
            likely += [*seen, *again, *_images_key(pipeline, accuracy)]
    if not parts:
        raise NotApplicable("no accuracy was reported")
    return Outcome("as counted", "; ".join(parts), worst <= 1, [*likely, "partial-test-set", "accuracy-wrong"], worst)


def _images_key(pipeline: Pipeline, told: float) -> list[str]:
    """Whether an accuracy that is not the test set's is that of other images: the training images, the loader's own."""
    data = pipeline.data
    if data is None:
        return []
    training = replace(data, test_images=data.train_images, test_labels=data.train_labels)
    others = {
        "accuracy-on-training": replace(pipeline, data=training),
        "test-loader-wrong": replace(pipeline, expected=replace(pipeline.expected, mean=None)),
    }
    counts = {key: accuracy_by_hand(other, torch.float32) for key, other in others.items() if other.test_batches}
    close = ACCURACY_CLOSE[torch.float32]
    return [key for key, (right, count, _) in counts.items() if abs(told - right / count) <= close + 0.5 / count]


def _accuracy_diagnosis(pipeline: Pipeline, recorded: float) -> list[str]:
    """What is seen while measuring again, and whether that gives the same."""
    fresh = _measured_again(pipeline)
    if fresh is None:
        return []
    keys = fresh[1].keys(_test_count(pipeline))
    if keys or abs(fresh[0].accuracy - recorded) <= 1e-9:
        return keys
    other = _measured_again(pipeline, other_random_numbers=True)
    repeats = other is not None and other[0].accuracy == fresh[0].accuracy
    return ["history-shifted", "history-stale"] if repeats else ["evaluation-not-repeatable"]


def _measured_again(pipeline: Pipeline, *, other_random_numbers: bool = False) -> tuple[EpochRecord, Seen] | None:
    """What `measure` says of the network as it is now; every call sees the same random numbers, unless others."""
    if pipeline.measure is None:
        return None
    epoch = max((pipeline.expected.epochs or 1) - 1, 0)
    one = torch.ones((), device=pipeline.device)
    means = EpochMeans()  # of one made-up step, for a `measure` that wants some
    means.add(Step(0, 1, 1, StepLosses(total=2 * one, task=one, logits=one, groups=0 * one, correct=one)))
    try:
        with preserve_state(pipeline), watching(pipeline.model) as seen:
            if other_random_numbers:
                reseed(OTHER_SEED)
            return pipeline.measure(pipeline, means, epoch, 0.0), seen
    except Exception as error:
        raise PartFailed("measure-raises", error) from error


def _test_count(pipeline: Pipeline) -> int:
    if pipeline.data is not None and len(pipeline.data.test_labels):
        return len(pipeline.data.test_labels)
    return sum(len(batch[1]) for batch in pipeline.test_batches(pipeline)) if pipeline.test_batches else 0


def _whole(pipeline: Pipeline, reported: Reported) -> Outcome:
    count, again = _test_count(pipeline), _measured_again(pipeline)
    if not count:
        raise NotApplicable("there is no test set")
    found = {} if again is None else {"measure": again[1]}
    if reported.seen is not None and reported.error is None:
        found["evaluate"] = reported.seen
    if not found:
        raise NotApplicable("nothing measures this pipeline")
    odd = {name: seen.keys(count) for name, seen in found.items()}
    parts = [f"{n}: {s.images:,} images" + (f" ({', '.join(odd[n])})" if odd[n] else "") for n, s in found.items()]
    likely = [key for keys in odd.values() for key in keys]
    return Outcome(f"{count:,} images in eval mode, quantizers on", "; ".join(parts), not likely, likely)


def _repeats(pipeline: Pipeline, reported: Reported) -> Outcome:
    if reported.error is not None:
        raise reported.error
    parts = ["evaluating changed the network"] if reported.changed else []
    first, before = _measured_again(pipeline), state_of(pipeline.model)
    second = _measured_again(pipeline, other_random_numbers=True)
    if first is None or second is None:
        raise NotApplicable("nothing measures this pipeline")
    if not same_state(before, state_of(pipeline.model)):
        parts.append("measuring changed the network")
    # As text, where NaN is NaN.
    if repr(replace(first[0], seconds=0.0)) != repr(replace(second[0], seconds=0.0)):
        parts.append(f"accuracy {100 * first[0].accuracy:.2f}%, then {100 * second[0].accuracy:.2f}%")
    if pipeline.evaluate is not None:
        with preserve_state(pipeline):
            accuracies = [pipeline.evaluate(_small(pipeline))[1] for _ in range(2)]
        if accuracies[0] != accuracies[1]:
            parts.append(f"{100 * accuracies[0]:.2f}% in float32, then {100 * accuracies[1]:.2f}%")
    likely = ["evaluation-changes-model" if reported.changed else None, "evaluation-not-repeatable"]
    same = "exactly the same"
    return Outcome(same, "; ".join(parts) or same, not parts, [*likely, "evaluation-changes-model"])


def _compression(pipeline: Pipeline, reported: Reported) -> Outcome:
    if reported.error is not None:
        raise reported.error
    if reported.result is None:
        raise NotApplicable("no compression was reported")
    return compression_outcome(pipeline, reported.result, disturbed=False)


@contextmanager
def _disturbed(pipeline: Pipeline) -> Iterator[Pipeline]:
    """Inside, the network is disturbed, and the pipeline has few test images: what it measures of them is no matter."""
    with preserve_state(pipeline):
        disturb_(pipeline.model, noise(pipeline))
        yield _small(pipeline)


def _small(pipeline: Pipeline) -> Pipeline:
    data = pipeline.data
    if data is None:
        return pipeline
    few = min(STRESS_IMAGES, len(data.test_labels))
    return replace(pipeline, data=replace(data, test_images=data.test_images[:few], test_labels=data.test_labels[:few]))


def _stressed_record(pipeline: Pipeline) -> Outcome:
    if pipeline.measure is None or not quantized_layers(pipeline.model):
        raise NotApplicable("nothing is measured, or no layer is quantized")
    with _disturbed(pipeline) as few:
        record, seen = cast(tuple[EpochRecord, Seen], _measured_again(few))
        if is_plain(record):
            raise NotApplicable("no record of an epoch is made")
        # A test loader of its own does not know of the few images.
        right = few_right(few) if pipeline.test_batches is run_test_batches else None
        fault, likely = EpochView.of(few, record, right=right).fault(few)
    likely = [*seen.keys(0), *likely, "report-wrong"]
    return Outcome("as counted on the network", fault or "as counted", not fault, likely)


def _stressed_compression(pipeline: Pipeline) -> Outcome:
    if pipeline.evaluate is None or not quantized_layers(pipeline.model):
        raise NotApplicable("no compression is reported, or no layer is quantized")
    with _disturbed(pipeline) as few:
        try:
            result, _ = pipeline.evaluate(few)
        except Exception as error:
            raise PartFailed("measure-raises", error) from error
        found = compression_outcome(few, result, disturbed=True)
    return replace(found, measured="as counted") if found.ok else found


def _state(reported: Reported) -> dict[str, Any]:
    if reported.checkpoint is None:
        raise NotApplicable("there is no checkpoint", "save")
    return load_checkpoint(reported.checkpoint)


def _checkpoint(pipeline: Pipeline, reported: Reported) -> Outcome:
    state = _state(reported)
    saved, own = cast(dict[str, Tensor], state["model"]), pipeline.model.state_dict()
    missing = sorted(own.keys() ^ saved.keys())
    differing = [name for name in own.keys() & saved.keys() if not equal_tensors(own[name], saved[name])]
    parts = [f"{names(missing)} missing or unknown"] if missing else []
    likely = ["checkpoint-incomplete"] if missing else []
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
    if not parts and pipeline.fresh is not None and (off := _restored(pipeline, saved)) > 1e-4:
        parts.append(f"a fresh network with it gives other outputs, by {off:.2g}")
        likely.append("checkpoint-incomplete")
    measured = "; ".join(parts) or f"all {len(own)} tensors, and the same outputs"
    return Outcome("every tensor as it is", measured, not parts, [*likely, "checkpoint-of-other-epoch"])


def _nearly(left: Tensor, right: Tensor) -> bool:
    """Whether the two differ by no more than half precision rounds."""
    return left.shape == right.shape and torch.allclose(right.cpu().double(), left.cpu().double(), 8e-3, 1e-6)


def _restored(pipeline: Pipeline, saved: dict[str, Tensor]) -> float:
    """How far the outputs of a fresh network with the checkpoint's tensors are off."""
    assert pipeline.fresh is not None
    with preserve_state(pipeline):
        again = pipeline.fresh()
    again.load_state_dict(saved)
    images = noise(pipeline)
    with torch.no_grad(), eval_mode(pipeline.model):
        return float((again.to(images.device).eval()(images) - pipeline.model(images)).abs().max())


def _going_on(pipeline: Pipeline, reported: Reported) -> Outcome:
    """Optimizer, records and configuration of the checkpoint beside those of the run that has just ended."""
    state = _state(reported)
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


def _verdict(runner: CheckRunner, pipeline: Pipeline, history: History | None) -> None:
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
