"""The verdict on a finished run: what a healthy one shows, what this one shows, and where to look if it does not.

Each expectation is judged by itself. One that is met passes, however short the run; one that a run could not meet yet,
because it was too short or saw too few images, is "not judged" instead of failed, and says what is missing. The run is
healthy when nothing failed and everything was judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

from experiments.pipeline.config import PRESETS, RunConfig
from src.training import History

PASSED, FAILED, NOT_JUDGED = "passed", "FAILED", "not judged"
FEWEST_STEPS = 500  # below this the logits, which move by a learning rate a step, have hardly moved
LOOK_AT = {
    "layers quantized": "exclude_layers: a pattern may take out more than was meant",
    "loss falls": "learning rate, normalisation of the images, labels",
    "accuracy climbs": "the loss curve; a peak of the penalty that is too high; quantizers off in training only",
    "accuracy reached": "the coefficient's peak (accuracy that falls as it ramps), then the learning-rate schedule",
    "zeros appear": "dead-zone logits: are they in the optimizer, is their regularization in the loss?",
    "channels die": "the coefficient's schedule, and whether BatchNorm's scale is in the groups",
    "bits fall": "bit-width logits: are they in the optimizer, does the 0.01 act in the loss?",
    "accuracy recovers": "the coefficient when accuracy fell; layers that died whole in the liveness map",
    "no layer dies whole": "the coefficient's peak: a whole branch was pruned away",
    "accuracy kept": "the peak of the penalty; more epochs; the curve of the baseline beside the run's",
    "budget met": "the column cost of history.csv; more epochs, a larger peak, or a larger budget",
}
"""Every expectation by name, and what to look at where it is not met."""


@dataclass(frozen=True)
class Expectation:
    """What was expected, what was measured, whether it was met (status), and what to look at where it was not."""

    name: str
    expected: str
    measured: str
    status: str
    look_at: str


@dataclass(frozen=True)
class Verdict:
    """All expectations of a run. healthy: nothing failed and everything was judged. faulty: something failed."""

    expectations: tuple[Expectation, ...]

    @property
    def faulty(self) -> bool:
        """Whether an expectation was not met."""
        return any(expectation.status == FAILED for expectation in self.expectations)

    @property
    def healthy(self) -> bool:
        """Whether every expectation was judged and met."""
        return all(expectation.status == PASSED for expectation in self.expectations)

    @property
    def headline(self) -> str:
        """The verdict in one line, with the names of what failed."""
        count, failed = len(self.expectations), [each.name for each in self.expectations if each.status == FAILED]
        if failed:
            return f"FAULT: {len(failed)} of {count} expectations not met ({', '.join(failed)})"
        if self.healthy:
            return f"HEALTHY: all {count} expectations met"
        open_ = [each.name for each in self.expectations if each.status == NOT_JUDGED]
        return f"INCONCLUSIVE: {count - len(open_)} of {count} expectations met, not judged: {', '.join(open_)}"

    def to_json(self) -> dict[str, Any]:
        """What run.json holds: state (healthy, faulty, inconclusive), headline, findings."""
        state = "healthy" if self.healthy else "faulty" if self.faulty else "inconclusive"
        return {"state": state, "headline": self.headline, "findings": [asdict(each) for each in self.expectations]}

    def text(self) -> str:
        """The expectations as a table for a terminal; below each that failed, what to look at."""
        names = max(len(each.name) for each in self.expectations)
        width = max(len(each.expected) for each in self.expectations)
        lines = [self.headline]
        for each in self.expectations:
            start = f"  {each.status:<10}  {each.name:<{names}}  "
            lines.append(f"{start}expected {each.expected:<{width}}  measured {each.measured}")
            if each.status == FAILED:
                lines.append(f"{'':<{len(start)}}look at: {each.look_at}")
        return "\n".join(lines)


def judge(
    history: History,
    config: RunConfig,
    num_classes: int,
    expected_layers: Sequence[str],
    steps: int | None = None,
    accuracies: tuple[float, float] | None = None,
) -> Verdict:
    """Judge a finished run by what its epochs recorded.

    expected_layers: names of the layers that should be quantized. steps: updates made in all, where that is known;
    below 500 most of what is not met is not judged. accuracies: of the run and of its baseline.
    """
    last, first = history.last, history[0]
    missing = _MissingEpochs.of(history, config, steps)
    expectations: list[Expectation] = []

    def expect(name: str, expected: str, measured: str, met: bool, lacking: float = 0, early: bool = True) -> None:
        """lacking: epochs until it can be judged. early: whether being met before that says something."""
        judged = lacking <= 0 or (met and early)
        if not judged:
            needed = "all images" if lacking == math.inf else f"{lacking} more epoch{'s' if lacking > 1 else ''}"
            measured += f"; needs {needed} to tell"
        status = NOT_JUDGED if not judged else PASSED if met else FAILED
        expectations.append(Expectation(name, expected, measured, status, LOOK_AT[name]))

    quantized = [layer.name for layer in last.layers]
    odd = sorted(set(expected_layers) ^ set(quantized))
    found = f"{len(quantized)}" + (f"; not as expected: {', '.join(odd[:3])}" if odd else "")
    expect("layers quantized", f"{len(expected_layers)}, every one by name", found, not odd)

    loss, loss_before = last.task_loss, first.task_loss
    expect(
        "loss falls",
        f"below {loss_before:.2f} (epoch 1)",
        f"{loss:.2f} task loss",
        loss < loss_before,
        2 - len(history),
    )

    chance, accuracy, needed = 1 / num_classes, last.accuracy, config.expected_accuracy
    floor = min(2 * chance, chance + (1 - chance) / 4)  # twice chance says nothing where there are two classes
    above = f"above {floor:.1%}; chance is {chance:.1%}"
    expect("accuracy climbs", above, f"{accuracy:.1%}", accuracy > floor, max(missing.steps, 2 - len(history)))
    expect("accuracy reached", f"at least {needed:.1%}", f"{accuracy:.1%}", accuracy >= needed, missing.full)

    # A budget of BOPs or bytes is met by whatever mixture of the three costs least.
    free = config.budget is not None and config.budget.kind != "macs"
    if config.learnable_deadzone and not free:
        zeros, zeros_before = last.unstructured_sparsity, first.unstructured_sparsity
        found, grown = f"{zeros_before:.1%} -> {zeros:.1%}", zeros > max(zeros_before, 0.01)
        expect("zeros appear", "more at the end than after epoch 1", found, grown, missing.zeros)
    if config.peak > 0 and not free:
        dead = last.structured_sparsity
        expect("channels die", "more than 0 dead filters", f"{dead:.1%} of the filters", dead > 0, missing.dead)
    if config.learnable_bit and not free:
        below = f"below {first.mean_bits:.1f} (epoch 1)" if len(history) > 1 else f"below {config.max_bits}"
        fallen = last.mean_bits < max(first.mean_bits, config.max_bits)
        expect("bits fall", below, f"{last.mean_bits:.2f} bits on average", fallen, missing.full)

    half = max(floor, *(record.accuracy for record in history)) / 2
    above, found = f"above {half:.1%} at the end, half of the best epoch", f"{accuracy:.1%}; {lowest_accuracy(history)}"
    expect("accuracy recovers", above, found, accuracy > half, max(missing.steps, 4 - len(history)), early=False)

    gone = [layer.name for layer in last.layers if all(layer.dead)]
    expect("no layer dies whole", "a live filter in every layer", ", ".join(gone) or "all live", not gone)
    if accuracies:
        lost = accuracies[1] - accuracies[0]
        found = f"{100 * lost:.2f} points: {accuracies[0]:.2%} against {accuracies[1]:.2%}"
        most = f"costs at most {100 * config.allowed_cost:g} points"
        expect("accuracy kept", most, found, lost <= config.allowed_cost, missing.full, early=False)
    if config.budget and last.cost is not None:
        used = f"{100 * last.cost:.4g} %, {last.cost / config.budget.share:.1%} of the budget"
        met = last.cost <= config.budget.share
        expect("budget met", f"at most {config.budget}", used, met, config.epochs - len(history))
    return Verdict(tuple(expectations))


def lowest_accuracy(history: History) -> str:
    """The lowest point of the test accuracy in words, and what BatchNorm's statistics have to do with it."""
    low = history.lowest
    fresh = low.recalibrated_accuracy
    lag = "" if fresh is None else f" ({fresh:.1%} with BatchNorm recalibrated)"
    return f"lowest {low.accuracy:.1%}{lag}, after epoch {low.epoch}"


def lagging_statistics(history: History, least: float = 0.1) -> str:
    """After how many epochs BatchNorm's statistics, measured anew, gain at least that much test accuracy, and which."""
    epochs = [one.epoch for one in history if (one.recalibrated_accuracy or 0) - one.accuracy >= least]
    runs = [list(pairs) for _, pairs in groupby(enumerate(epochs), lambda pair: pair[1] - pair[0])]
    spans = [f"{run[0][1]}–{run[-1][1]}" if len(run) > 1 else f"{run[0][1]}" for run in runs]
    return f"{len(epochs)} of {len(history)} epochs" + (f" ({', '.join(spans)})" if spans else "")


class _MissingEpochs(NamedTuple):
    """How many epochs a run lacks until expectations can be judged; infinite where it lacks images.

    steps: until the logits have had the steps to move. full: until the preset's length. zeros, dead: until zeros, and
    dead filters, have had the epochs under the penalty that they take to appear.
    """

    steps: float
    full: float
    zeros: float
    dead: float

    @classmethod
    def of(cls, history: History, config: RunConfig, steps: int | None) -> _MissingEpochs:
        preset = PRESETS.get(config.preset, config)  # a configuration of one's own is measured by itself
        done = len(history)
        if config.limit is not None:
            return cls(math.inf, math.inf, math.inf, math.inf)
        few = 0 if steps is None else math.ceil(FEWEST_STEPS * done / steps) - done
        full = max(few, preset.epochs - done)
        penalised = sum(record.coefficient > 0 for record in history)
        before = max(config.delay + (config.ramp > 0) - done, 0)  # epochs until the coefficient rises
        settle = (preset.epochs - preset.delay) // 2 - penalised
        zeros = min(full, max(few, 0 if penalised else before + 1)) if config.peak > 0 else full
        return cls(few, full, zeros, max(few, before + settle if settle > 0 else 0))
