"""The verdict on a finished run: what a healthy one shows, what this one shows, and where to look if it does not.

Each expectation is judged by itself. One that a run could not meet, because it was too short or saw too few images, is
"not judged" instead of failed; the run is healthy when nothing failed and everything was judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
    "nothing collapses": "the coefficient when accuracy fell; layers that died whole in the liveness map",
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
        met = sum(each.status == PASSED for each in self.expectations)
        return f"INCONCLUSIVE: {met} of {count} expectations met, the rest could not be judged in this run"

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
    below 500 most of what is expected is not judged. accuracies: of the run and of its baseline.
    """
    last, first = history.last, history[0]
    preset = PRESETS.get(config.preset, config)  # a configuration of one's own is measured by itself
    several = len(history) > 1
    enough = config.limit is None and (steps is None or steps >= FEWEST_STEPS)
    full = enough and len(history) >= preset.epochs
    penalised = sum(record.coefficient > 0 for record in history)
    settled = penalised >= (preset.epochs - preset.delay) // 2  # epochs that dead filters take to appear
    expectations: list[Expectation] = []

    def expect(name: str, expected: str, measured: str, met: bool, judged: bool = True) -> None:
        if not judged:
            measured += ", in a run too short or too small to tell"
        status = NOT_JUDGED if not judged else PASSED if met else FAILED
        expectations.append(Expectation(name, expected, measured, status, LOOK_AT[name]))

    quantized = [layer.name for layer in last.layers]
    odd = sorted(set(expected_layers) ^ set(quantized))
    found = f"{len(quantized)}" + (f"; not as expected: {', '.join(odd[:3])}" if odd else "")
    expect("layers quantized", f"{len(expected_layers)}, every one by name", found, not odd)

    loss, loss_before = last.task_loss, first.task_loss
    expect("loss falls", f"below {loss_before:.2f} (epoch 1)", f"{loss:.2f} task loss", loss < loss_before, several)

    chance, accuracy, needed = 1 / num_classes, last.accuracy, config.expected_accuracy
    floor = min(2 * chance, chance + (1 - chance) / 4)  # twice chance says nothing where there are two classes
    above = f"above {floor:.1%}; chance is {chance:.1%}"
    expect("accuracy climbs", above, f"{accuracy:.1%}", accuracy > floor, enough and several)
    expect("accuracy reached", f"at least {needed:.1%}", f"{accuracy:.1%}", accuracy >= needed, full)

    if config.learnable_deadzone:
        zeros, zeros_before = last.unstructured_sparsity, first.unstructured_sparsity
        found, grown = f"{zeros_before:.1%} -> {zeros:.1%}", zeros > max(zeros_before, 0.01)
        expect("zeros appear", "more at the end than after epoch 1", found, grown, full or (enough and penalised > 0))
    if config.peak > 0:
        dead = last.structured_sparsity
        expect("channels die", "more than 0 dead filters", f"{dead:.1%} of the filters", dead > 0, enough and settled)
    if config.learnable_bit:
        below = f"below {first.mean_bits:.1f} (epoch 1)" if several else f"below {config.max_bits}"
        fallen = last.mean_bits < max(first.mean_bits, config.max_bits)
        expect("bits fall", below, f"{last.mean_bits:.2f} bits on average", fallen, full)

    half = max(floor, *(record.accuracy for record in history)) / 2
    above = f"above {half:.1%}, half of the best epoch"
    expect("nothing collapses", above, f"{accuracy:.1%}", accuracy > half, enough and len(history) > 3)

    gone = [layer.name for layer in last.layers if all(layer.dead)]
    expect("no layer dies whole", "a live filter in every layer", ", ".join(gone) or "all live", not gone)
    if accuracies:
        lost = accuracies[1] - accuracies[0]
        found = f"{100 * lost:.2f} points: {accuracies[0]:.2%} against {accuracies[1]:.2%}"
        most = f"costs at most {100 * config.allowed_cost:g} points"
        expect("accuracy kept", most, found, lost <= config.allowed_cost, full)
    if config.budget and last.cost is not None:
        used = f"{100 * last.cost:.4g} %, {last.cost / config.budget.share:.1%} of the budget"
        met = last.cost <= config.budget.share
        expect("budget met", f"at most {config.budget}", used, met, met or len(history) >= config.epochs)
    return Verdict(tuple(expectations))
