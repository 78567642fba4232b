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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.diagnosis import equations
from experiments.diagnosis.by_hand import ACCURACY_CLOSE, accuracy_by_hand
from experiments.diagnosis.probe import Norm
from experiments.diagnosis.quantizer_checks import bits_in_use, expected_weight, flat, logits
from experiments.diagnosis.subject import Subject
from experiments.diagnosis.training_checks import record_fault
from experiments.diagnosis.ward import Broken, NotApplicable, Outcome, Ward, names, undisturbed
from experiments.evaluator import EvalResult
from metrics import ModelStats
from src.compaction import compact
from src.modes import eval_mode
from src.records import EpochRecord, History
from src.runs import load_checkpoint
from src.training import EpochMeans, Step, StepLosses
from utils_quantization import FakeQuantParametrization, latent_weight, quantized_layers

ACTIVATION_BITS = 32
STRESS_IMAGES = 96
LOSS_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


@dataclass
class Seen:
    """What passed through the network while it was measured."""

    images: int = 0
    training: bool = False
    quantizers_off: bool = False
    handles: list[Any] = field(default_factory=list)


@dataclass
class Reported:
    """The figures under test. checkpoint: of the last epoch; history: all records; result, accuracy: the evaluation."""

    checkpoint: Path | None = None
    history: History | None = None
    result: EvalResult | None = None
    accuracy: float | None = None
    seen: Seen | None = None
    changed: bool = False
    error: Broken | None = None


def account_checks(ward: Ward, subject: Subject, reported: Reported) -> None:
    """Add the findings about what was reported. The network is the one that training left."""
    if subject.evaluate is not None and reported.result is None:
        _evaluate(subject, reported)
    ward.check("checkpoint", "it gives back the network of the history's last epoch", _checkpoint, subject, reported)
    ward.check("last record", "sparsity, dead filters and bits, counted again", _record, subject, reported)
    ward.check("test accuracy", "the share of right answers, counted by hand", _accuracy, subject, reported)
    ward.check("whole test set", "every test image, in eval mode, quantizers on", _whole, subject, reported)
    ward.check("evaluation repeats", "twice the same figures, and nothing changed", _repeats, subject, reported)
    ward.check("reported compression", "MACs and BOPs of the trained network", _compression, subject, reported)
    ward.check("measuring", "records of a disturbed network are right", _stressed_record, subject)
    ward.check("compression", "MACs and BOPs of a disturbed network are right", _stressed_compression, subject)


def _evaluate(subject: Subject, reported: Reported) -> None:
    assert subject.evaluate is not None
    before = _state(subject.model)
    with watching(subject.model) as seen:
        try:
            reported.result, reported.accuracy = subject.evaluate(subject)
        except Exception as error:
            reported.error = Broken("measure-raises", error)
    reported.seen = seen
    reported.changed = not _same(before, _state(subject.model))


@contextmanager
def watching(model: nn.Module) -> Iterator[Seen]:
    """Count the images that pass, and note BatchNorm in training mode and quantizers that are off."""
    seen = Seen()

    def count(module: nn.Module, inputs: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and not isinstance(inputs[0], torch.fx.Proxy):
            seen.images += len(inputs[0])

    def look(module: nn.Module, inputs: Any) -> None:
        seen.training |= module.training

    def switch(module: nn.Module, inputs: Any) -> None:
        seen.quantizers_off |= not cast(Any, module).enabled

    seen.handles = [model.register_forward_pre_hook(count)]
    for module in model.modules():
        if isinstance(module, Norm):
            seen.handles.append(module.register_forward_pre_hook(look))
        elif isinstance(module, FakeQuantParametrization):
            seen.handles.append(module.register_forward_pre_hook(switch))
    try:
        yield seen
    finally:
        for handle in seen.handles:
            handle.remove()


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(_equal(left[name], right[name]) for name in left)


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left.cpu(), right.cpu())


def _checkpoint(subject: Subject, reported: Reported) -> Outcome:
    if reported.checkpoint is None:
        raise NotApplicable("there is no checkpoint")
    state = load_checkpoint(reported.checkpoint)
    saved, own = cast(dict[str, Tensor], state["model"]), subject.model.state_dict()
    parts: list[str] = []
    likely: list[str | None] = []
    missing = sorted(own.keys() ^ saved.keys())
    differing = [name for name in own.keys() & saved.keys() if not _equal(own[name], saved[name])]
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
    if not parts and subject.fresh is not None:
        parts += _restored(subject, saved)
        likely.append("checkpoint-incomplete")
    measured = "; ".join(parts) or f"all {len(own)} tensors, and the same outputs"
    return Outcome("every tensor as it is", measured, not parts, [*likely, "checkpoint-of-other-epoch"])


def _nearly(left: Tensor, right: Tensor) -> bool:
    """Whether the two differ by no more than half precision rounds."""
    if left.shape != right.shape or not left.is_floating_point():
        return False
    return bool(((left.cpu() - right.cpu()).abs() <= 8e-3 * left.cpu().abs() + 1e-6).all())


def _restored(subject: Subject, saved: dict[str, Tensor]) -> list[str]:
    """Whether a fresh network with the checkpoint's tensors gives the same outputs."""
    assert subject.fresh is not None
    with undisturbed(subject):
        again = subject.fresh()
    again.load_state_dict(saved)
    images = _first_test_images(subject, 32)
    if images is None:
        return []
    with torch.no_grad(), eval_mode(subject.model):
        again = again.to(images.device).eval()
        difference = float((again(images) - subject.model(images)).abs().max())
    return [] if difference < 1e-4 else [f"a fresh network with it gives other outputs, by {difference:.2g}"]


def _first_test_images(subject: Subject, count: int) -> Tensor | None:
    if subject.test_batches is None:
        return None
    for images, _ in subject.test_batches(subject):
        return images[:count].to(subject.device)
    return None


def _record(subject: Subject, reported: Reported) -> Outcome:
    if reported.history is None or not reported.history.records:
        raise NotApplicable("there is no history")
    record = reported.history.records[-1]
    if not quantized_layers(subject.model):
        raise NotApplicable("no layer is quantized")
    fault, likely = record_fault(subject, record)
    measured = fault or (
        f"{100 * record.unstructured_sparsity:.2f}% zeros, {100 * record.structured_sparsity:.2f}% dead, "
        f"{record.mean_bits:.2f} bits"
    )
    return Outcome("as counted from the latent weights", measured, not fault, [*likely, "report-wrong"])


def _accuracy(subject: Subject, reported: Reported) -> Outcome:
    parts: list[str] = []
    likely: list[str | None] = []
    worst = 0.0
    if reported.history is not None and reported.history.records and subject.measure is not None:
        record = reported.history.records[-1]
        right, count, loss = accuracy_by_hand(subject, subject.precision)
        close = ACCURACY_CLOSE[subject.precision] + 0.5 / count
        off, loss_off = abs(record.accuracy - right / count), abs(record.test_loss - loss) / max(loss, 0.05)
        worst = max(off / close, loss_off / LOSS_CLOSE[subject.precision])
        parts.append(f"{100 * record.accuracy:.2f}% recorded, {100 * right / count:.2f}% counted")
        if worst > 1:
            parts.append(f"test loss {record.test_loss:.4f} recorded, {loss:.4f} counted")
            likely += _accuracy_diagnosis(subject, reported, record) + _training_images_key(subject, record.accuracy)
    if reported.accuracy is not None:
        right, count, _ = accuracy_by_hand(subject, torch.float32)
        off = abs(reported.accuracy - right / count)
        parts.append(f"{100 * reported.accuracy:.2f}% reported in float32, {100 * right / count:.2f}% counted")
        close = ACCURACY_CLOSE[torch.float32] + 0.5 / count
        worst = max(worst, off / close)
        if off > close:
            likely += _mode_keys(reported.seen, count) + _training_images_key(subject, reported.accuracy)
    if not parts:
        raise NotApplicable("no accuracy was reported")
    return Outcome("as counted", "; ".join(parts), worst <= 1, [*likely, "partial-test-set", "accuracy-wrong"], worst)


def _training_images_key(subject: Subject, told: float) -> list[str]:
    """Whether an accuracy that is not the test set's is that of the training images."""
    if subject.data is None:
        return []
    data = subject.data
    own = replace(data, test_images=data.train_images, test_labels=data.train_labels)
    right, count, _ = accuracy_by_hand(replace(subject, data=own), torch.float32)
    return ["accuracy-on-training"] if abs(told - right / count) <= ACCURACY_CLOSE[torch.float32] + 0.5 / count else []


def _mode_keys(seen: Seen | None, count: int) -> list[str]:
    if seen is None:
        return []
    keys = ["quantizers-off-in-evaluation"] if seen.quantizers_off else []
    keys += ["evaluation-in-training-mode"] if seen.training else []
    return keys + (["partial-test-set"] if 0 < seen.images < count else [])


def _accuracy_diagnosis(subject: Subject, reported: Reported, record: EpochRecord) -> list[str]:
    """Records of other epochs that fit better, and what was seen while measuring again."""
    keys: list[str] = []
    seen = _measured_again(subject)
    if seen is not None:
        keys += _mode_keys(seen[1], _test_count(subject))
        fresh = seen[0]
        if not keys and abs(fresh.accuracy - record.accuracy) > 1e-9:
            keys += ["history-shifted", "history-stale"]
    return keys


def _measured_again(subject: Subject) -> tuple[EpochRecord, Seen] | None:
    """What `measure` says of the network as it is now."""
    if subject.measure is None:
        return None
    epoch = max((subject.promise.epochs or 1) - 1, 0)
    try:
        with undisturbed(subject), watching(subject.model) as seen:
            return subject.measure(subject, _means(subject), epoch, 0.0), seen
    except Exception as error:
        raise Broken("measure-raises", error) from error


def _means(subject: Subject) -> EpochMeans:
    """Means of one made-up step, for a `measure` that wants some."""
    one = torch.ones((), device=subject.device)
    means = EpochMeans()
    means.add(Step(0, 1, 1, StepLosses(one, one, one, one, one)))
    return means


def _test_count(subject: Subject) -> int:
    if subject.data is not None:
        return len(subject.data.test_labels)
    return sum(len(batch[1]) for batch in subject.test_batches(subject)) if subject.test_batches else 0


def _whole(subject: Subject, reported: Reported) -> Outcome:
    count = _test_count(subject)
    if not count:
        raise NotApplicable("there is no test set")
    found: dict[str, Seen] = {}
    again = _measured_again(subject)
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


def _repeats(subject: Subject, reported: Reported) -> Outcome:
    if reported.error is not None:
        raise reported.error
    parts: list[str] = []
    if reported.changed:
        parts.append("evaluating changed the network")
    first, before = _measured_again(subject), _state(subject.model)
    second = _measured_again(subject)
    if first is None or second is None:
        raise NotApplicable("nothing measures this pipeline")
    if not _same(before, _state(subject.model)):
        parts.append("measuring changed the network")
    a, b = replace(first[0], seconds=0.0), replace(second[0], seconds=0.0)
    if a != b:
        parts.append(f"accuracy {100 * a.accuracy:.2f}%, then {100 * b.accuracy:.2f}%")
    if subject.evaluate is not None:
        with undisturbed(subject):
            accuracies = [subject.evaluate(_small(subject))[1] for _ in range(2)]
        if accuracies[0] != accuracies[1]:
            parts.append(f"{100 * accuracies[0]:.2f}% in float32, then {100 * accuracies[1]:.2f}%")
    likely = ["evaluation-changes-model" if reported.changed else None, "evaluation-not-repeatable"]
    likely += ["evaluation-changes-model"]
    return Outcome("exactly the same", "; ".join(parts) or "exactly the same", not parts, likely)


def _compression(subject: Subject, reported: Reported) -> Outcome:
    if reported.error is not None:
        raise reported.error
    if reported.result is None:
        raise NotApplicable("no compression was reported")
    return compare_compression(subject, reported.result)


@dataclass(frozen=True)
class Cost:
    """A layer's cost, counted a second time: MACs per image of all weights and of those that are not zero, and bits.

    unsure: MACs of weights so close to the dead zone's border that float32 may count them otherwise.
    """

    dense: int
    nonzero: int
    bits: float
    unsure: int = 0


def costs(subject: Subject) -> dict[str, Cost]:
    """Every convolution and linear layer of the network, by name: output pixels by hooks, zeros by the equations."""
    model, settings = subject.model, subject.promise.quantizer
    pixels: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            hooks.append(module.register_forward_hook(_pixel_hook(pixels, name)))
    size = subject.promise.input_size or (3, 32, 32)
    try:
        with torch.no_grad(), eval_mode(model):
            model(torch.zeros(1, *size, device=subject.device))
    finally:
        for hook in hooks:
            hook.remove()
    quantized = quantized_layers(model)
    found = {}
    for name, count in pixels.items():
        layer = model.get_submodule(name)
        total, unsure = latent_weight(layer).numel(), 0
        if name in quantized and settings is not None:
            values, grid = expected_weight(settings, layer)
            bits = bits_in_use(settings, logits(layer)[1])
            weights = flat(latent_weight(layer))
            border = np.abs(weights) < grid.shift + grid.step
            nonzero, unsure = int((values != 0).sum()), int((border & equations.near_a_threshold(weights, grid)).sum())
        elif name in quantized:
            with torch.no_grad():
                nonzero = int(cast(Tensor, layer.weight).count_nonzero())
            bits = float(cast(Any, layer).parametrizations.weight[0].quantizer.get_bitwidth())
        else:
            nonzero, bits = int(latent_weight(layer).count_nonzero()), 32.0
        found[name] = Cost(total * count, nonzero * count, bits, unsure * count)
    return found


def _pixel_hook(pixels: dict[str, int], name: str) -> Any:
    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        pixels[name] = output[0, 0].numel() if output.dim() > 2 else 1

    return count


def flops_macs(network: nn.Module, size: tuple[int, int, int], device: torch.device) -> int:
    """MACs for one image by torch.utils.flop_counter, which counts two operations a MAC."""
    counter = FlopCounterMode(display=False)
    with eval_mode(network), torch.no_grad(), counter:
        network(torch.zeros(1, *size, device=device))
    return int(counter.get_total_flops()) // 2


def compare_compression(subject: Subject, result: EvalResult) -> Outcome:
    """A result against the costs counted a second time, for the network as it is now."""
    meant = costs(subject)
    dense = sum(cost.dense for cost in meant.values())
    full = dense * 32.0 * ACTIVATION_BITS
    macs = sum(cost.nonzero for cost in meant.values())
    bops = sum(cost.nonzero * cost.bits * ACTIVATION_BITS for cost in meant.values())
    found = result.unstructured_stats
    close = max(sum(cost.unsure for cost in meant.values()), 0.5)
    wrong: list[str] = []
    likely: list[str] = []
    odd_bits = [s.name for s in found.layers if s.name in meant and abs(s.bitwidth - meant[s.name].bits) > 1e-6]
    if odd_bits:
        wrong.append(f"other bits in {names(odd_bits)}")
        likely += ["bops-wrong-bits", "bits-misreported"]
    if abs(found.total_macs - macs) > close:
        wrong.append(f"{found.total_macs:,} MACs of non-zero weights, {macs:,} counted")
        likely += ["bops-dense-density" if abs(found.total_macs - dense) < close else "macs-wrong"]
    unsure_bops = sum(cost.unsure * cost.bits * ACTIVATION_BITS for cost in meant.values())
    if abs(found.total_bops - bops) > max(unsure_bops, 1e-6 * bops):
        wrong.append(f"{found.total_bops:.4g} BOPs, {bops:.4g} counted")
        likely += _bops_diagnosis(meant, found.total_bops, bops)
    fault, keys = _ratio_fault(result, dense)
    if fault:
        wrong.append(fault)
        likely += keys
    _structured(subject, result, meant, wrong, likely)
    measured = "; ".join(wrong[:2]) or f"{macs:,} MACs, {full / max(bops, 1):.2f} times fewer BOPs"
    return Outcome("as counted from weights, bits and a built network", measured, not wrong, [*likely, "bops-wrong"])


def _bops_diagnosis(meant: dict[str, Cost], found: float, right: float) -> list[str]:
    """Which other formula gives the BOPs that were reported."""
    layers = meant.values()
    mean_bits = sum(cost.bits for cost in layers) / len(layers)
    quantized = [cost for cost in layers if cost.bits < 32]
    plain_mean = sum(cost.bits for cost in quantized) / max(len(quantized), 1)
    guesses: dict[str, list[float]] = {
        "bops-dense-density": [sum(c.dense * c.bits * ACTIVATION_BITS for c in layers)],
        "bops-wrong-bits": [
            *(sum(c.nonzero * (b if c.bits < 32 else 32) * ACTIVATION_BITS for c in layers) for b in (32, 16, 8, 4, 2)),
            sum(c.nonzero * mean_bits * ACTIVATION_BITS for c in layers),
            sum(c.nonzero * (plain_mean if c.bits < 32 else 32) * ACTIVATION_BITS for c in layers),
            *(sum(c.nonzero * b * ACTIVATION_BITS for c in layers) for b in (8, 4)),
        ],
        "bops-activation-bits": [sum(c.nonzero * c.bits * b for c in layers) for b in (1, 4, 8, 16)]
        + [sum(c.nonzero * c.bits * c.bits for c in layers)],
    }
    off = {key: min(abs(found - guess) / max(guess, 1.0) for guess in values) for key, values in guesses.items()}
    return [key for key in sorted(off, key=lambda key: off[key]) if off[key] < 0.002] or [
        "bops-wrong",
        "bops-wrong-bits",
    ]


def _ratio_fault(result: EvalResult, dense: int) -> tuple[str, list[str]]:
    """A ratio that is not the dense FP32 network's cost over the compressed one's, and what it is instead.

    dense: MACs of the dense network. Each ratio times its own denominator is the baseline that was meant; where the
    ratios agree on another one, the baseline is wrong, and else the formula.
    """
    full = {"BOPs": dense * 32.0 * ACTIVATION_BITS, "MACs": float(dense)}
    reported = [
        ("BOPs", result.unstructured_bops_ratio, result.unstructured_stats.total_bops),
        ("MACs", result.unstructured_mac_ratio, result.unstructured_stats.total_macs),
        ("BOPs", result.structured_bops_ratio, result.structured_stats.total_bops),
        ("MACs", result.structured_mac_ratio, result.structured_stats.total_macs),
    ]
    meant = [(kind, ratio, full[kind] / cost, ratio * cost) for kind, ratio, cost in reported if cost]
    off = [(kind, ratio, right, used) for kind, ratio, right, used in meant if abs(ratio - right) > 1e-3 * right]
    if not off:
        return "", []
    kind, ratio, right, _ = off[0]
    baselines = [used / full[kind] for kind, _, _, used in meant if any(kind == other for other, *_ in off)]
    agree = len(baselines) > 1 and max(baselines) - min(baselines) < 1e-3 * max(baselines)
    keys = ["baseline-wrong", "ratio-wrong"] if agree else ["ratio-wrong", "baseline-wrong"]
    return f"{ratio:.4g} times fewer {kind}, {right:.4g} counted", keys


def _structured(
    subject: Subject, result: EvalResult, meant: dict[str, Cost], wrong: list[str], likely: list[str]
) -> None:
    """The network that exact removal leaves, built and counted."""
    size = subject.promise.input_size or (3, 32, 32)
    found = result.structured_stats
    with eval_mode(subject.model):
        try:
            built = flops_macs(compact(subject.model, size), size, subject.device)
        except ValueError:  # a network that removal does not know or leaves nothing of
            return
    if abs(found.total_macs - built) > 0.5:
        wrong.append(f"{found.total_macs:,} MACs after removal, {built:,} in the network that is left")
        likely += ["dead-counted-as-removed", "macs-wrong"]
    bops = sum(s.macs * (meant[s.name].bits if s.name in meant else 32.0) * ACTIVATION_BITS for s in found.layers)
    if abs(found.total_bops - bops) > 1e-4 * bops:
        wrong.append(f"{found.total_bops:.4g} BOPs after removal, {bops:.4g} counted")
        likely += ["bops-wrong-bits", "bops-wrong"]
    _dead(subject, found, wrong, likely)


def _dead(subject: Subject, found: ModelStats, wrong: list[str], likely: list[str]) -> None:
    settings = subject.promise.quantizer
    layers = quantized_layers(subject.model)
    for stats in found.layers:
        if stats.name not in layers or settings is None:
            continue
        layer = layers[stats.name]
        values = torch.from_numpy(expected_weight(settings, layer)[0]).view(latent_weight(layer).shape)
        dead = {int(i) for i in torch.nonzero((values == 0).flatten(1).all(1)).flatten()}
        inputs = {int(i) for i in torch.nonzero((values == 0).transpose(0, 1).flatten(1).all(1)).flatten()}
        if set(stats.dead_out) != dead:
            wrong.append(f"{stats.name}: {len(stats.dead_out)} dead filters, {len(dead)} counted")
            by_input = set(stats.dead_out) == inputs
            likely += ["dead-per-input", "dead-wrong"] if by_input else ["dead-wrong", "dead-per-input"]
            return


@contextmanager
def disturbed(subject: Subject) -> Iterator[None]:
    """Inside, every layer has another bit width, a wide dead zone, and its own number of dead filters and inputs."""
    with undisturbed(subject):
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for place, layer in enumerate(quantized_layers(subject.model).values()):
                quantizer = cast(Any, layer).parametrizations.weight[0].quantizer
                latent = latent_weight(layer)
                for leaf, theta in (("logit_dz", 0.5 + 0.15 * (place % 5)), ("logit_bit", 0.25 + 0.3 * (place % 6))):
                    if isinstance(getattr(quantizer, leaf, None), Tensor):
                        getattr(quantizer, leaf).fill_(theta)
                outputs, inputs = latent.shape[:2]
                latent[torch.randperm(outputs, generator=generator)[: 1 + outputs // 5]] = 0.0
                latent[:, torch.randperm(inputs, generator=generator)[: inputs // 3]] = 0.0
        yield


def _small(subject: Subject) -> Subject:
    """The same subject with few test images: what it measures of them does not matter here."""
    data = subject.data
    if data is None:
        return subject
    few = min(STRESS_IMAGES, len(data.test_labels))
    return replace(subject, data=replace(data, test_images=data.test_images[:few], test_labels=data.test_labels[:few]))


def _stressed_record(subject: Subject) -> Outcome:
    if subject.measure is None or not quantized_layers(subject.model):
        raise NotApplicable("nothing is measured, or no layer is quantized")
    with disturbed(subject):
        few = _small(subject)
        again = _measured_again(few)
        assert again is not None
        fault, likely = record_fault(few, again[0])
    record = again[0]
    measured = fault or (
        f"{100 * record.unstructured_sparsity:.1f}% zeros, {100 * record.structured_sparsity:.1f}% dead, "
        f"{record.mean_bits:.2f} bits"
    )
    keys = _mode_keys(again[1], 0)
    return Outcome("as counted from the latent weights", measured, not fault, [*keys, *likely, "report-wrong"])


def _stressed_compression(subject: Subject) -> Outcome:
    if subject.evaluate is None or not quantized_layers(subject.model):
        raise NotApplicable("no compression is reported, or no layer is quantized")
    with disturbed(subject):
        few = _small(subject)
        try:
            result, _ = subject.evaluate(few)
        except Exception as error:
            raise Broken("measure-raises", error) from error
        return compare_compression(few, result)
