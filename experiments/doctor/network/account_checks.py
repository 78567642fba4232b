"""Afterwards: every reported figure a second time, from the checkpoint and in another way.

accuracy    by a loop of its own over the whole test set
sparsity    zeros of the weights that experiments/diagnosis/equations.py gives from the latent ones
dead        filters of those weights that are entirely zero
bits        from the logits
MACs        of the dense network and of the one that exact removal builds, by torch.utils.flop_counter
BOPs        MACs x weight bits x 32, a layer at a time
What a short run leaves equal (no dead filter, one bit width) is told apart on a disturbed copy of the network. Axis
letters: N test images, O output channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from experiments.doctor.core.by_hand import ACCURACY_CLOSE, accuracy_by_hand
from experiments.doctor.network.compression_account import compare_compression
from experiments.doctor.pipeline import Pipeline, is_plain, run_test_batches
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, PartFailed, preserve_state, reseed
from experiments.doctor.training.checkpoint_checks import checkpoint_checks
from experiments.doctor.training.record_checks import EpochView, counted, fault_of_epoch, few_right, record_fault
from experiments.doctor.training.reported import Reported, Seen, same_state, state_of, watching
from src.training import EpochMeans, EpochRecord, Step, StepLosses
from utils_quantization import latent_weight, quantized_layers

STRESS_IMAGES = 96
OTHER_SEED = 20_251
AS_COUNTED = "as counted"  # the figures of a disturbed copy are not the run's
LOSS_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def account_checks(runner: CheckRunner, pipeline: Pipeline, reported: Reported) -> None:
    """Add the findings about what was reported. The network is the one that training left."""
    if pipeline.evaluate is not None and reported.result is None:
        _evaluate(pipeline, reported)
    checkpoint_checks(runner, pipeline, reported)
    runner.check("last record", "sparsity, dead filters and bits, counted again", _record, pipeline, reported)
    runner.check("test accuracy", "the share of right answers, counted by hand", _accuracy, pipeline, reported)
    runner.check("whole test set", "every test image, in eval mode, quantizers on", _whole, pipeline, reported)
    runner.check("evaluation repeats", "twice the same figures, and nothing changed", _repeats, pipeline, reported)
    runner.check("reported compression", "MACs and BOPs of the trained network", _compression, pipeline, reported)
    runner.check("measuring", "records of a copy disturbed on purpose are right", _stressed_record, pipeline)
    runner.check(
        "compression", "MACs and BOPs of a copy disturbed on purpose are right", _stressed_compression, pipeline
    )


def _evaluate(pipeline: Pipeline, reported: Reported) -> None:
    assert pipeline.evaluate is not None
    before = state_of(pipeline.model)
    with watching(pipeline.model) as seen:
        try:
            reported.result, reported.accuracy = pipeline.evaluate(pipeline)
        except Exception as error:
            reported.error = PartFailed("measure-raises", error)
    reported.seen = seen
    reported.changed = not same_state(before, state_of(pipeline.model))


def _record(pipeline: Pipeline, reported: Reported) -> Outcome:
    if reported.history is None or not reported.history.records:
        raise NotApplicable("there is no history")
    record = reported.history.records[-1]
    if is_plain(record):
        raise NotApplicable("no record of an epoch is made")
    if not quantized_layers(pipeline.model):
        raise NotApplicable("no layer is quantized")
    fault, likely = record_fault(pipeline, record)
    measured = fault or (
        f"{100 * record.unstructured_sparsity:.2f}% zeros, {100 * record.structured_sparsity:.2f}% dead, "
        f"{record.mean_bits:.2f} bits"
    )
    return Outcome("as counted from the latent weights", measured, not fault, [*likely, "report-wrong"])


def _accuracy(pipeline: Pipeline, reported: Reported) -> Outcome:
    parts: list[str] = []
    likely: list[str | None] = []
    worst = 0.0
    if reported.history is not None and reported.history.records and pipeline.measure is not None:
        record = reported.history.records[-1]
        right, count, loss = accuracy_by_hand(pipeline, pipeline.precision)
        close = ACCURACY_CLOSE[pipeline.precision] + 0.5 / count
        off, loss_off = abs(record.accuracy - right / count), abs(record.test_loss - loss) / max(loss, 0.05)
        worst = max(off / close, loss_off / LOSS_CLOSE[pipeline.precision])
        parts.append(f"{100 * record.accuracy:.2f}% recorded, {100 * right / count:.2f}% counted")
        if worst > 1:
            parts.append(f"test loss {record.test_loss:.4f} recorded, {loss:.4f} counted")
            likely += _accuracy_diagnosis(pipeline, reported, record) + _training_images_key(pipeline, record.accuracy)
    if reported.accuracy is not None:
        right, count, _ = accuracy_by_hand(pipeline, torch.float32)
        off = abs(reported.accuracy - right / count)
        parts.append(f"{100 * reported.accuracy:.2f}% reported in float32, {100 * right / count:.2f}% counted")
        close = ACCURACY_CLOSE[torch.float32] + 0.5 / count
        worst = max(worst, off / close)
        if off > close:
            likely += _mode_keys(reported.seen, count) + _training_images_key(pipeline, reported.accuracy)
    if not parts:
        raise NotApplicable("no accuracy was reported")
    return Outcome("as counted", "; ".join(parts), worst <= 1, [*likely, "partial-test-set", "accuracy-wrong"], worst)


def _training_images_key(pipeline: Pipeline, told: float) -> list[str]:
    """Whether an accuracy that is not the test set's is that of the training images."""
    if pipeline.data is None:
        return []
    data = pipeline.data
    own = replace(data, test_images=data.train_images, test_labels=data.train_labels)
    right, count, _ = accuracy_by_hand(replace(pipeline, data=own), torch.float32)
    return ["accuracy-on-training"] if abs(told - right / count) <= ACCURACY_CLOSE[torch.float32] + 0.5 / count else []


def _mode_keys(seen: Seen | None, count: int) -> list[str]:
    if seen is None:
        return []
    keys = ["quantizers-off-in-evaluation"] if seen.quantizers_off else []
    keys += ["evaluation-in-training-mode"] if seen.training else []
    return keys + (["partial-test-set"] if 0 < seen.images < count else [])


def _accuracy_diagnosis(pipeline: Pipeline, reported: Reported, record: EpochRecord) -> list[str]:
    """Records of other epochs that fit better, and what was seen while measuring again."""
    keys: list[str] = []
    seen = _measured_again(pipeline)
    if seen is not None:
        keys += _mode_keys(seen[1], _test_count(pipeline))
        fresh = seen[0]
        if not keys and abs(fresh.accuracy - record.accuracy) > 1e-9:
            other = _measured_again(pipeline, other_random_numbers=True)
            repeats = other is not None and other[0].accuracy == fresh.accuracy
            keys += ["history-shifted", "history-stale"] if repeats else ["evaluation-not-repeatable"]
    return keys


def _measured_again(pipeline: Pipeline, *, other_random_numbers: bool = False) -> tuple[EpochRecord, Seen] | None:
    """What `measure` says of the network as it is now; every call sees the same random numbers, unless others."""
    if pipeline.measure is None:
        return None
    epoch = max((pipeline.expected.epochs or 1) - 1, 0)
    try:
        with preserve_state(pipeline), watching(pipeline.model) as seen:
            if other_random_numbers:
                reseed(OTHER_SEED)
            return pipeline.measure(pipeline, _means(pipeline), epoch, 0.0), seen
    except Exception as error:
        raise PartFailed("measure-raises", error) from error


def _means(pipeline: Pipeline) -> EpochMeans:
    """Means of one made-up step, for a `measure` that wants some."""
    one = torch.ones((), device=pipeline.device)
    means = EpochMeans()
    means.add(Step(0, 1, 1, StepLosses(total=2 * one, task=one, logits=one, groups=0 * one, correct=one)))
    return means


def _test_count(pipeline: Pipeline) -> int:
    if pipeline.data is not None:
        return len(pipeline.data.test_labels)
    return sum(len(batch[1]) for batch in pipeline.test_batches(pipeline)) if pipeline.test_batches else 0


def _whole(pipeline: Pipeline, reported: Reported) -> Outcome:
    count = _test_count(pipeline)
    if not count:
        raise NotApplicable("there is no test set")
    found: dict[str, Seen] = {}
    again = _measured_again(pipeline)
    if again is not None:
        found["measure"] = again[1]
    if reported.seen is not None and reported.error is None:
        found["evaluate"] = reported.seen
    if not found:
        raise NotApplicable("nothing measures this pipeline")
    parts, likely = [], []
    for name, seen in found.items():
        keys = _mode_keys(seen, count)
        likely += keys
        parts.append(f"{name}: {seen.images:,} images" + (f" ({', '.join(keys)})" if keys else ""))
    return Outcome(f"{count:,} images in eval mode, quantizers on", "; ".join(parts), not likely, likely)


def _repeats(pipeline: Pipeline, reported: Reported) -> Outcome:
    if reported.error is not None:
        raise reported.error
    parts: list[str] = []
    if reported.changed:
        parts.append("evaluating changed the network")
    first, before = _measured_again(pipeline), state_of(pipeline.model)
    second = _measured_again(pipeline, other_random_numbers=True)
    if first is None or second is None:
        raise NotApplicable("nothing measures this pipeline")
    if not same_state(before, state_of(pipeline.model)):
        parts.append("measuring changed the network")
    a, b = replace(first[0], seconds=0.0), replace(second[0], seconds=0.0)
    if a != b:
        parts.append(f"accuracy {100 * a.accuracy:.2f}%, then {100 * b.accuracy:.2f}%")
    if pipeline.evaluate is not None:
        with preserve_state(pipeline):
            accuracies = [pipeline.evaluate(_small(pipeline))[1] for _ in range(2)]
        if accuracies[0] != accuracies[1]:
            parts.append(f"{100 * accuracies[0]:.2f}% in float32, then {100 * accuracies[1]:.2f}%")
    likely = ["evaluation-changes-model" if reported.changed else None, "evaluation-not-repeatable"]
    likely += ["evaluation-changes-model"]
    return Outcome("exactly the same", "; ".join(parts) or "exactly the same", not parts, likely)


def _compression(pipeline: Pipeline, reported: Reported) -> Outcome:
    if reported.error is not None:
        raise reported.error
    if reported.result is None:
        raise NotApplicable("no compression was reported")
    return compare_compression(pipeline, reported.result)


@contextmanager
def disturbed(pipeline: Pipeline) -> Iterator[None]:
    """Inside, every layer has another bit width, a wide dead zone, and its own number of dead filters and inputs."""
    with preserve_state(pipeline):
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for place, layer in enumerate(quantized_layers(pipeline.model).values()):
                quantizer = cast(Any, layer).parametrizations.weight[0].quantizer
                latent = latent_weight(layer)
                for leaf, theta in (("logit_dz", 0.5 + 0.15 * (place % 5)), ("logit_bit", 0.25 + 0.3 * (place % 6))):
                    if isinstance(getattr(quantizer, leaf, None), Tensor):
                        getattr(quantizer, leaf).fill_(theta)
                outputs, inputs = latent.shape[:2]
                latent[torch.randperm(outputs, generator=generator)[: 1 + outputs // 5]] = 0.0
                latent[:, torch.randperm(inputs, generator=generator)[: inputs // 3]] = 0.0
        yield


def _small(pipeline: Pipeline) -> Pipeline:
    """The same pipeline with few test images: what it measures of them does not matter here."""
    data = pipeline.data
    if data is None:
        return pipeline
    few = min(STRESS_IMAGES, len(data.test_labels))
    return replace(pipeline, data=replace(data, test_images=data.test_images[:few], test_labels=data.test_labels[:few]))


def _stressed_record(pipeline: Pipeline) -> Outcome:
    if pipeline.measure is None or not quantized_layers(pipeline.model):
        raise NotApplicable("nothing is measured, or no layer is quantized")
    with disturbed(pipeline):
        few = _small(pipeline)
        again = _measured_again(few)
        assert again is not None
        if is_plain(again[0]):
            raise NotApplicable("no record of an epoch is made")
        # A test loader of its own does not know of the few images.
        right = few_right(few) if pipeline.test_batches is run_test_batches else None
        fault, likely = fault_of_epoch(EpochView(again[0], None, right, *counted(few)), few)
    keys = _mode_keys(again[1], 0)
    return Outcome(
        "as counted from the latent weights", fault or AS_COUNTED, not fault, [*keys, *likely, "report-wrong"]
    )


def _stressed_compression(pipeline: Pipeline) -> Outcome:
    if pipeline.evaluate is None or not quantized_layers(pipeline.model):
        raise NotApplicable("no compression is reported, or no layer is quantized")
    with disturbed(pipeline):
        few = _small(pipeline)
        try:
            result, _ = pipeline.evaluate(few)
        except Exception as error:
            raise PartFailed("measure-raises", error) from error
        found = compare_compression(few, result)
        return replace(found, measured=AS_COUNTED) if found.ok else found
