"""Figures of records and evaluations, a second time: counted on the network, on the raw test images, over the steps.

A figure that is wrong is explained by the mutant of the account that gives it. Axis letters: L layers, N test images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from experiments.doctor.causes.account_mutants import MUTANTS
from experiments.doctor.causes.explain import Observables, explain
from experiments.doctor.pipeline import Batch, Pipeline, is_plain
from experiments.doctor.reference.accounting import Account, Layer, layers_of, macs_of, needed_channels
from experiments.doctor.runner import NotApplicable, Outcome, names
from experiments.evaluator import EvalResult
from metrics import NullChannels
from src.pruning import compact
from src.training import EpochRecord, autocast
from utils_quantization import eval_mode, shared_quantized_weights

FEW_TEST_IMAGES = 1000
NOISE_IMAGES = 8
OFF_BY_CHANCE = 0.02  # share of the channels that a ReLU may hold at zero for all images of noise
SAME_OUTPUTS = 1e-3  # of the largest one; float32 is good to 1e-5
ACCURACY_CLOSE = {torch.float32: 5e-4, torch.bfloat16: 5e-3}  # beside half an image
LOSS_CLOSE = {torch.float32: 2e-3, torch.bfloat16: 3e-2}  # relative
CLOSE = {"zeros": 2e-3, "sparsity": 1e-4, "dead zones": 1e-4}  # a weight on a threshold; others agree to rounding
FALLBACK = {
    **dict.fromkeys(("sparsity", "zeros"), ("sparsity-wrong", "history-stale", "sparsity-on-latent")),
    **dict.fromkeys(("dead share", "dead filters"), ("dead-wrong", "dead-per-input")),
    **dict.fromkeys(("mean bits", "bits"), ("bits-misreported", "history-stale")),
    "dead zones": ("history-stale", "report-wrong"),
    "MACs of non-zero weights": ("macs-wrong",),
    "MACs of removal": ("dead-counted-as-removed", "macs-wrong"),
    **dict.fromkeys(("BOPs of non-zero weights", "BOPs of removal"), ("bops-wrong", "bops-wrong-bits")),
    **dict.fromkeys(("mac ratios", "bops ratios"), ("ratio-wrong", "baseline-wrong")),
}
"""Causes where no mutant explains a figure, in the order in which figures follow from each other."""
Fault = tuple[str, list[str]]
"""What is wrong in words, "" for nothing, and the keys of what may explain it."""


def figures_of_record(record: EpochRecord) -> Observables:
    """A record's figures under the names that `Account.figures` gives them."""
    layers = record.layers
    network = {
        "sparsity": [record.unstructured_sparsity],
        "dead share": [record.structured_sparsity],
        "mean bits": [record.mean_bits],
    }
    own = {
        "zeros": [layer.sparsity for layer in layers],
        "dead filters": [float(dead) for layer in layers for dead in layer.dead],
        "bits": [layer.bits for layer in layers],
        "dead zones": [layer.dead_zone for layer in layers],
    }
    return _tensors({**network, **own})


def figures_of_evaluation(result: EvalResult, layers: Sequence[Layer]) -> Observables:
    """An evaluation's figures of these layers under the names that `Account.figures` gives them."""
    left, nonzero = result.structured_stats.layers, result.unstructured_stats.layers
    return _tensors(
        {
            "bits": [layer.bitwidth for layer in nonzero],
            "zeros": [layer.pruning_ratio for layer in nonzero],
            "dead filters": [
                float(o in stats.dead_out) for stats, x in zip(left, layers, strict=True) for o in range(len(x.weight))
            ],
            "MACs of non-zero weights": [layer.macs for layer in nonzero],
            "MACs of removal": [layer.macs for layer in left],
            "BOPs of non-zero weights": [layer.bops for layer in nonzero],
            "BOPs of removal": [layer.bops for layer in left],
            "mac ratios": [result.unstructured_mac_ratio, result.structured_mac_ratio],
            "bops ratios": [result.unstructured_bops_ratio, result.structured_bops_ratio],
        }
    )


def _tensors(values: dict[str, list[float]]) -> Observables:
    return {name: torch.tensor(held, dtype=torch.float64) for name, held in values.items()}


def wrong_figures(found: Observables, right: Observables) -> Observables:
    """Those of the figures found that are not right."""

    def is_right(name: str) -> bool:
        a, b = found[name], right[name]
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=CLOSE.get(name, 1e-9), equal_nan=True)

    return {name: found[name] for name in right if name in found and not is_right(name)}


def fault_of_figures(found: Observables, layers: Sequence[Layer]) -> Fault:
    """What of the figures found is wrong; the mutants that give them explain it."""
    right = Account().figures(layers)
    wrong = wrong_figures(found, right)
    if not wrong:
        return "", []
    keys = explain(wrong, Account(), MUTANTS, lambda account: account.figures(layers))
    first = next(name for name in FALLBACK if name in wrong)
    if wrong[first].shape != right[first].shape:
        text = f"{first}: {len(wrong[first])} figures for {len(right[first])}"
    else:
        worst = int((wrong[first] - right[first]).abs().argmax())
        where = f" of {layers[worst].name}" if len(wrong[first]) == len(layers) > 1 else ""
        text = f"{first}{where}: {float(wrong[first][worst]):.6g} reported, {float(right[first][worst]):.6g} counted"
    return text, [*keys, *FALLBACK[first]]


@dataclass(frozen=True)
class StepMeans:
    """Means over the steps of an epoch, all of which were seen: losses, and the share of right answers."""

    loss: float
    task_loss: float
    logit_penalty: float
    group_penalty: float
    train_accuracy: float

    @classmethod
    def of(cls, steps: Sequence[tuple[float, ...]], images: int) -> StepMeans:
        """steps: total, task, logits, groups and right answers of each; images: of all of them."""
        total, task, logits, groups, right = (math.fsum(values) for values in zip(*steps, strict=True))
        count = len(steps)
        return cls(total / count, task / count, logits / count, groups / count, right / max(images, 1))


@dataclass(frozen=True)
class EpochView:
    """The network at the end of an epoch: its record, and the same figures a second time.

    means: where all steps were seen. right: right answers, test images and test loss, where there are few. rate: of the
    optimizer's first group in the last step that was seen.
    """

    record: EpochRecord
    means: StepMeans | None = None
    right: tuple[int, int, float] | None = None
    rate: float = math.nan
    counted: Observables = field(default_factory=dict)
    fault_of_layers: Fault = ("", [])
    dead_layers: tuple[str, ...] = ()

    @classmethod
    def of(cls, pipeline: Pipeline, record: EpochRecord, **known: Any) -> EpochView:
        """The view of a record, of the network as it is now."""
        layers = [layer for layer in layers_of(pipeline.model, pipeline.expected.quantizer) if layer.quantized]
        if not layers or is_plain(record):
            return cls(record, **known)
        own, claimed = [layer.name for layer in layers], [layer.name for layer in record.layers]
        if own != claimed:
            odd = names(sorted(set(own) ^ set(claimed))) or "another order"
            fault: Fault = f"the layers are not those of the network: {odd}", ["report-wrong", "history-stale"]
        else:
            fault = fault_of_figures(figures_of_record(record), layers)
        dead = tuple(layer.name for layer in layers if not layer.weight.any())
        return cls(record, **known, counted=Account().figures(layers), fault_of_layers=fault, dead_layers=dead)

    def describes(self, other: EpochView) -> bool:
        """Whether the record is that of `other`'s network, which is not the one of its own epoch."""
        found, right = figures_of_record(self.record), other.counted
        return not wrong_figures(found, right) and bool(wrong_figures(self.counted, right))

    def fault(self, pipeline: Pipeline) -> Fault:
        """What is wrong with the record, and the causes that fit."""
        if self.right is not None and self.accuracy_is_off(pipeline):
            counted = 100 * self.right[0] / self.right[1]
            text = f"accuracy {100 * self.record.accuracy:.2f}% recorded, {counted:.2f}% counted"
            return text, ["accuracy-wrong", "quantizers-off-in-evaluation"]
        text, keys = self._fault_of_means(pipeline)
        return (text, keys) if text else self.fault_of_layers

    def accuracy_is_off(self, pipeline: Pipeline) -> bool:
        """Whether the recorded accuracy differs from the recounted one by more than the precision allows."""
        if self.right is None:
            return False
        right, count, _ = self.right
        return abs(self.record.accuracy - right / count) > ACCURACY_CLOSE[pipeline.precision] + 0.5 / count

    def _fault_of_means(self, pipeline: Pipeline) -> Fault:
        """Whether losses, training accuracy and test loss are what the steps and the test set say."""
        record, close = self.record, LOSS_CLOSE[pipeline.precision]
        for name, mean in asdict(self.means).items() if self.means is not None else ():
            reported = float(getattr(record, name))
            given = math.isfinite(mean) and (mean != 0 or name in ("loss", "task_loss"))  # 0: the step does not tell
            if given and not abs(reported - mean) <= 0.01 * abs(mean) + 1e-4:
                text = f"{name.replace('_', ' ')} {reported:.4f} recorded, {mean:.4f} is the steps' mean"
                return text, ["loss-misreported" if "accuracy" not in name else "accuracy-wrong", "report-wrong"]
        if self.right is not None and not abs(record.test_loss - self.right[2]) <= close * self.right[2]:
            text = f"test loss {record.test_loss:.4f} recorded, {self.right[2]:.4f} counted"
            return text, ["test-loss-wrong", "report-wrong"]
        if math.isfinite(self.rate) and not abs(record.learning_rate - self.rate) <= 1e-6 * self.rate + 1e-12:
            text = f"learning rate {record.learning_rate:.4g} recorded, {self.rate:.4g} in the last step"
            return text, ["rate-misreported", "report-wrong"]
        rest = record.loss - record.task_loss - record.logit_penalty - record.coefficient * record.group_penalty
        if pipeline.expected.config is not None and not abs(rest) <= 0.01 * abs(record.loss) + 1e-4:
            text = f"loss {record.loss:.4f} is not task + logits + coefficient x groups, by {rest:.4f}"
            # Where its parts are the steps' own, what does not fit is the coefficient.
            return text, ["loss-misreported" if self.means is None else "coefficient-wrong", "report-wrong"]
        return "", []


def records_outcome(pipeline: Pipeline, views: Sequence[EpochView], first_epoch: int) -> Outcome:
    """Whether the records are of epochs 1, 2, ..., each as the network then was. first_epoch: that was seen, from 0."""
    if views and views[-1].accuracy_is_off(pipeline):  # the last stage sees how it was measured, and names why
        views = [replace(view, right=None) for view in views]
    wrong: list[str] = []
    likely: list[str] = []
    shifted = False
    for place, view in enumerate(views):
        number = first_epoch + place + 1
        if view.record.epoch != number:
            wrong.append(f"record {number} is of epoch {view.record.epoch}")
            likely.append("history-shifted")
            continue
        fault, keys = view.fault(pipeline)
        if fault:
            wrong.append(f"epoch {number}: {fault}")
            likely += keys
            shifted |= bool(place and view.counted) and view.describes(views[place - 1])
    likely = ["history-shifted", "history-stale", *likely] if shifted else likely
    measured = "; ".join(wrong[:2]) or f"{len(views)} records agree with the network"
    return Outcome("epochs 1, 2, ..., each as the network then was", measured, not wrong, [*likely, "report-wrong"])


@torch.no_grad()
def accuracy_by_hand(pipeline: Pipeline, precision: torch.dtype) -> tuple[int, int, float]:
    """Right answers, images, and mean cross entropy over the whole test set. Raises NotApplicable without one."""
    right, losses = 0, []
    with eval_mode(pipeline.model), shared_quantized_weights(pipeline.model):
        for images, labels in _tests(pipeline):
            images, labels = images.to(pipeline.device), labels.to(pipeline.device)
            with autocast(images.device, precision):
                scores = pipeline.model(images)
            scores = scores.float()
            right += int((scores.argmax(1) == labels).sum())
            losses.append(scores.logsumexp(1) - scores.gather(1, labels[:, None])[:, 0])
    if not losses:
        raise NotApplicable("the test set is empty")
    every = torch.cat(losses).double()
    return right, len(every), float(every.mean())


def _tests(pipeline: Pipeline) -> Iterable[Batch]:
    """The raw test images, (image / 255 - mean) / std, where they and their statistics are known; else the loader's."""
    data, of = pipeline.data, pipeline.data if pipeline.expected.config else pipeline.expected
    if data is None or of is None or not len(data.test_labels) or pipeline.expected.mean is None or of.std is None:
        if pipeline.test_batches is None:
            raise NotApplicable("there is no test set", "tests")
        yield from pipeline.test_batches(pipeline)
        return
    centre, width = (torch.tensor(each, dtype=torch.float64).view(-1, 1, 1) for each in (of.mean, of.std))
    for first in range(0, len(data.test_labels), 250):
        raw = data.test_images[first : first + 250]
        x = (raw.double() / 255 - centre.to(raw.device)) / width.to(raw.device)
        yield x.float().contiguous(memory_format=torch.channels_last), data.test_labels[first : first + 250]


def few_right(pipeline: Pipeline) -> tuple[int, int, float] | None:
    """`accuracy_by_hand`, where the test set is small enough to be read after every epoch."""
    if pipeline.data is None or pipeline.test_batches is None or len(pipeline.data.test_labels) > FEW_TEST_IMAGES:
        return None
    try:
        return accuracy_by_hand(pipeline, pipeline.precision)
    except Exception:  # the pipeline's own evaluation will say so
        return None


def noise(pipeline: Pipeline) -> Tensor:
    """Images of noise of the expected size, (N, C, H, W)."""
    size = pipeline.expected.input_size or (3, 32, 32)
    return torch.randn(NOISE_IMAGES, *size, generator=torch.Generator().manual_seed(0)).to(pipeline.device)


def compression_outcome(pipeline: Pipeline, result: EvalResult, *, disturbed: bool) -> Outcome:
    """An evaluation against the network as it is now, and the network that removal leaves against the original."""
    model, images = pipeline.model, noise(pipeline)
    layers = layers_of(model, pipeline.expected.quantizer, images.shape[1:])
    if {layer.name for layer in layers} != {stats.name for stats in result.structured_stats.layers}:
        raise NotApplicable("the layers reported are others than those that were seen at work")
    order = {stats.name: place for place, stats in enumerate(result.structured_stats.layers)}
    layers = tuple(sorted(layers, key=lambda layer: order[layer.name]))
    with eval_mode(model), torch.no_grad():
        try:
            smaller = compact(model, tuple(images.shape[1:]), atol=math.inf)
        except ValueError as reason:  # a network that removal does not know or leaves nothing of
            raise NotApplicable(str(reason)) from reason
        meant, given = model(images), smaller(images)
    off = float((given - meant).abs().max() / meant.abs().max().clamp(min=1e-9))
    macs = macs_of(smaller, images.shape[1:])
    layers = tuple(replace(layer, left=float(macs.get(layer.name, 0))) for layer in layers)
    odd = _odd_channels(needed_channels(model, images), result)
    odd["kept"] = odd["kept"] if disturbed else []  # others may be needed for other images alone
    fault, likely = fault_of_figures(figures_of_evaluation(result, layers), layers)
    wrong = [fault] if fault else []
    if not off <= SAME_OUTPUTS:
        wrong.append(f"without the removed channels outputs differ by {100 * off:.2g}%")
        likely = ["live-channel-removed" if odd["removed"] else "constants-dropped", *likely]
        likely += ["constants-dropped"]
    elif odd["removed"] or odd["kept"]:
        built = odd["kept"] and not fault and not odd["removed"]
        likely += ["channels-not-removed" if built else "report-wrong", "report-wrong"]
    wrong += [f"channels of {names(odd['removed'])} are needed and said to be removed"] if odd["removed"] else []
    wrong += [f"channels of {names(odd['kept'])} are not needed and kept"] if odd["kept"] else []
    right = sum(float(layer.weight.count_nonzero()) * layer.pixels for layer in layers)
    measured = "; ".join(wrong[:2]) or f"{right:,.0f} MACs of non-zero weights, {macs['']:,} of the network left"
    return Outcome("as counted on the network, and on the one that is left", measured, not wrong, likely)


def _odd_channels(needed: dict[str, tuple[Tensor, Tensor]], result: EvalResult) -> dict[str, list[str]]:
    """Layers of which needed channels are said to be removed, and of which others are kept, if more than a few are."""
    removed, kept, count, total = [], [], 0, 0
    for stats in result.structured_stats.layers:
        for flags, missing in zip(needed[stats.name], (stats.null_out, stats.null_in), strict=True):
            gone = _removed(missing)
            if len(flags) == len(gone):  # of a depthwise convolution they are not
                removed += [stats.name] * int((gone & flags).any())
                kept += [stats.name] * int((~gone & ~flags).any())
                count, total = count + int((~gone & ~flags).sum()), total + len(flags)
    few = count <= OFF_BY_CHANCE * total
    return {"removed": list(dict.fromkeys(removed)), "kept": [] if few else list(dict.fromkeys(kept))}


def _removed(missing: NullChannels) -> Tensor:
    flags = torch.zeros(missing.total, dtype=torch.bool)
    flags[list(missing.indices)] = True
    return flags
