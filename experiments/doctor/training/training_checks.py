"""While training: what was seen of the epochs, judged.

What can be known for certain (steps and images of an epoch, learning rate, coefficient, records, what changed between
two epochs) is compared exactly; what depends on luck (accuracy, collapse) is judged late and loosely.
Axis letters: N images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from experiments.doctor.checks.penalty import coefficient_outcome
from experiments.doctor.expected import factor_of, kind_of
from experiments.doctor.pipeline import Pipeline, is_plain
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, names
from experiments.doctor.training.records import EpochView, records_outcome

FEWEST_STEPS = 60  # updates below which accuracy is not judged
FEWEST_LABELS = 32  # images of an epoch below which its order says nothing


@dataclass
class EpochSteps:
    """The steps of an epoch that were seen. number from 0; whole: whether none was missed; over: whether it ended.

    losses: total, task, logits, groups and right answers of each, on the device until they are read. labels: (N,) of
    every batch, where they were heard. rates: share of the run done and the weights' learning rate. still: what should
    learn and did not move, where that was seen.
    """

    number: int
    whole: bool
    over: bool = False
    images: int = 0
    losses: list[Any] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    rates: list[tuple[float, float]] = field(default_factory=list)
    still: list[str] | None = None

    def read(self) -> list[tuple[float, ...]]:
        """The losses as numbers. Waits for the device, hence not at every step."""
        self.losses = [tuple(each.tolist()) if isinstance(each, Tensor) else each for each in self.losses]
        return self.losses

    @property
    def order(self) -> Tensor:
        """The labels in the order of the epoch; empty where they were not heard, or are not whole numbers."""
        plain = bool(self.labels) and all(each.dim() == 1 and not each.is_floating_point() for each in self.labels)
        return torch.cat(self.labels).cpu() if plain else torch.empty(0, dtype=torch.int64)


@dataclass
class Gap:
    """Between two epochs. epoch: the later one, from 0; changed: names of what changed; jump, moved: how far the
    learnables went there and in the epoch before, 2-norm."""

    epoch: int
    changed: list[str]
    jump: float
    moved: float


@dataclass
class Watched:
    """What was seen of a training run. missed: whether steps were made that were not seen.

    logits: all of them, before the first epoch that was seen and after each. logit_rates: every rate that a group of
    logits had. counts: the optimizer's own count of updates after the first step of an epoch, and what follows from the
    one before. norm_updates: of every BatchNorm's statistics, and whether it learns.
    """

    pipeline: Pipeline
    views: list[EpochView] = field(default_factory=list)
    epochs: list[EpochSteps] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    counts: list[tuple[int, int]] = field(default_factory=list)
    logits: list[dict[str, float]] = field(default_factory=list)
    logit_rates: dict[str, set[float]] = field(default_factory=dict)
    norm_updates: list[tuple[int, bool]] = field(default_factory=list)
    learnable: tuple[str, ...] = ()
    steps: int = 0
    missed: bool = False
    raised: tuple[str, str] | None = None

    @property
    def own(self) -> bool:
        """Whether it is the project's own pipeline, of which everything is known."""
        return self.pipeline.expected.config is not None

    @property
    def first_epoch(self) -> int:
        """The epoch with which the watch began, from 0."""
        return self.epochs[0].number if self.epochs else 0

    def recorded(self, count: int = 1) -> list[EpochView]:
        """The epochs that were recorded. Raises NotApplicable below `count`."""
        if len(self.views) < count:
            raise NotApplicable(f"{len(self.views)} epochs were recorded; this needs {count}")
        return self.views


def _finite(seen: Watched) -> Outcome:
    if seen.raised is not None:
        text, cause = seen.raised
        large = "learning-rate-too-large" if cause == "loss-not-finite" else None
        return Outcome("no error", text, False, [cause, large])
    if not seen.steps and not seen.views:
        raise NotApplicable("nothing was trained")
    losses = [parts[0] for epoch in seen.epochs for parts in epoch.read()]
    bad = [number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)]
    measured = f"{seen.steps} steps" + (f"; the loss of step {bad[0]} is not finite" if bad else "")
    return Outcome("finite losses", measured, not bad, ["loss-not-finite", "learning-rate-too-large"])


def _whole(seen: Watched) -> Outcome:
    """Later epochs have as many images as the first, each class as often as the data has it, in another order."""
    epochs = [epoch for epoch in seen.epochs if epoch.whole and epoch.over]
    if len(epochs) < 2:
        raise NotApplicable("this needs two epochs that were seen from the first step to the last")
    first = epochs[0]
    expected = f"{first.images:,} images in {len(first.losses)} steps, as in the first"
    slack = 0 if seen.own else first.images / len(first.losses)
    for epoch in epochs[1:]:
        text = f"epoch {epoch.number + 1}: {epoch.images:,} images in {len(epoch.losses)} steps"
        if abs(epoch.images - first.images) > slack:
            return Outcome(expected, text, False, ["loader-incomplete", "loader-repeats"])
    for epoch in epochs:
        odd = _odd_labels(seen, epoch)
        if odd:
            text = f"epoch {epoch.number + 1}: {odd} labels too many or too few of a class"
            return Outcome("every image once", text, False, ["loader-repeats", "loader-incomplete"])
    orders = [epoch.order for epoch in epochs]
    alike = [epoch.number + 1 for epoch, a, b in zip(epochs[1:], orders, orders[1:], strict=False) if _alike(a, b)]
    if alike:
        text = f"epoch {alike[0]} has the labels in the order of the epoch before"
        return Outcome("an order of its own in every epoch", text, False, ["loader-same-order"], unusual=not seen.own)
    return Outcome(expected, f"so in {len(epochs)} epochs", True)


def _odd_labels(seen: Watched, epoch: EpochSteps) -> int:
    """By how many the labels of an epoch differ from the data's, beyond an incomplete batch that was dropped."""
    data, order = seen.pipeline.data, epoch.order
    if data is None or not 0 <= len(data.train_labels) - len(order) <= epoch.images / len(epoch.losses):
        return 0
    counts = [torch.bincount(labels.cpu(), minlength=data.num_classes) for labels in (data.train_labels, order)]
    if counts[0].shape != counts[1].shape:
        return 0
    return int((counts[0] - counts[1]).abs().sum()) - (len(data.train_labels) - len(order))


def _goes_on(seen: Watched) -> Outcome:
    """In the project's own pipeline nothing changes between two epochs; in another one the weights do not jump."""
    if not seen.gaps:
        raise NotApplicable("this needs a second epoch that was seen from its beginning")
    for gap in seen.gaps:
        weights = [name for name in gap.changed if name in seen.learnable]
        if weights or (gap.changed and seen.own):
            small = not seen.own and gap.jump < gap.moved / 2
            measured = f"{names(weights or gap.changed)} changed before epoch {gap.epoch + 1} began"
            likely = ["weights-reset", "changes-too-much"] if weights else ["evaluation-changes-model"]
            return Outcome("nothing changes between two epochs", measured, False, likely, unusual=small)
    return Outcome("nothing changes between two epochs", f"so at the start of {len(seen.gaps)} epochs", True)


def _moves(seen: Watched) -> Outcome:
    epochs = [epoch for epoch in seen.epochs if epoch.still is not None]
    if not epochs:
        raise NotApplicable("this needs an epoch that was seen from its beginning to its end")
    count = len(seen.learnable)
    for epoch in epochs:
        if epoch.still:
            now = dict(seen.pipeline.model.named_parameters())
            frozen = any(n in now and not now[n].requires_grad for n in epoch.still)
            logits = all(kind_of(n) != "weights" for n in epoch.still)
            likely = ["no-update" if len(epoch.still) == count else None, "parameter-frozen" if frozen else None]
            likely += ["logits-stuck" if logits else "gradient-missing"]
            measured = f"{names(epoch.still)} stood still in epoch {epoch.number + 1}"
            return Outcome(f"all {count}", measured, False, likely)
    return Outcome(f"all {count}", f"all moved in each of {len(epochs)} epochs", True)


def _counts(seen: Watched) -> Outcome:
    if not seen.counts:
        raise NotApplicable("the optimizer keeps no count, or no second epoch was seen")
    odd = [(count, meant) for count, meant in seen.counts if count != meant]
    measured = f"{odd[0][0]} updates counted for {odd[0][1]}" if odd else f"in {len(seen.counts)} epochs"
    return Outcome("one update more than before the epoch", measured, not odd, ["optimizer-reset", "no-update"])


def _records(seen: Watched) -> Outcome:
    views = seen.recorded()
    if all(is_plain(view.record) for view in views):
        raise NotApplicable("no record of an epoch is made", "" if seen.pipeline.measure else "measure")
    return records_outcome(seen.pipeline, views, seen.first_epoch)


def _coefficient(seen: Watched) -> Outcome:
    expected = seen.pipeline.expected.coefficients
    if expected is None:
        raise NotApplicable("no schedule is expected")
    views, first = seen.recorded(), seen.first_epoch
    wanted = list(expected[first : first + len(views)])
    outcome = coefficient_outcome([view.record.coefficient for view in views], wanted, "the records say")
    if not outcome.ok or seen.pipeline.objective.penalty is None:
        return outcome
    applied = {epoch.number: list(_applied(epoch)) for epoch in seen.epochs}
    if not any(applied.values()):
        if not any(wanted) or not seen.steps:
            return outcome
        text = "no step's loss holds a penalty"
        return Outcome(outcome.expected, text, False, ["penalty-not-in-loss", "coefficient-never-ramps"])
    used = [_median(applied.get(first + place) or [0.0]) for place in range(len(wanted))]
    close = [abs(a - b) <= 0.02 * max(b, 1e-4) for a, b in zip(used, wanted, strict=True)]
    rounded = [b if near else a for a, b, near in zip(used, wanted, close, strict=True)]
    return outcome if all(close) else coefficient_outcome(rounded, wanted, "the steps' losses hold")


def _rate(seen: Watched) -> Outcome:
    config, expected = seen.pipeline.expected.config, seen.pipeline.expected.groups
    rates = [(epoch.number, *each) for epoch in seen.epochs for each in epoch.rates]
    if config is None or expected is None or not rates:
        raise NotApplicable("no learning rate is expected or none was seen")
    factor, base = factor_of(config), expected["weights"].learning_rate
    off = [(e, rate, base * factor(done)) for e, done, rate in rates if abs(rate - base * factor(done)) > 1e-3 * base]
    measured = f"as expected in {len(rates) - len(off)} of {len(rates)} steps"
    likely: list[str | None] = []
    if off:
        epoch, rate, meant = off[0]
        measured += f"; epoch {epoch + 1}: {rate:.3g} instead of {meant:.3g}"
        likely += ["learning-rate-zero"] if rate == 0 else []
        likely += ["learning-rate-too-large"] if rate > 9 * base else []
    changing = [leaf for leaf, own in seen.logit_rates.items() if len(own) > 1]
    if changing:
        measured += f"; the rate of {names(changing)} changes, and should not"
    wanted = "base rate x the configured factor, for the weights alone"
    return Outcome(wanted, measured, not off and not changing, [*likely, "learning-rate-schedule"])


def _norm_statistics(seen: Watched) -> Outcome:
    """One update a step; in a pipeline of one's own several passes a step are legal, and so are frozen layers."""
    if not seen.norm_updates or not seen.steps or seen.missed:
        raise NotApplicable("some steps were not seen" if seen.missed else "there is no BatchNorm, or no step was seen")
    counts = [count for count, learns in seen.norm_updates if seen.own or learns or count]
    if not counts:
        raise NotApplicable("every BatchNorm is frozen")
    few, many = min(counts), max(counts)
    ok = few == many and (many == seen.steps or (not seen.own and many > 0 and many % seen.steps == 0))
    likely = ["batchnorm-in-eval" if few < seen.steps else "evaluation-in-training-mode", "evaluation-changes-model"]
    return Outcome(f"{seen.steps}, one a step", f"{few} to {many} updates of the statistics", ok, likely)


def _logit_movement(seen: Watched) -> Outcome:
    """Adam moves a parameter by at most a few learning rates a step; squares in the loss draw it to 0 steadily."""
    expected, (start, end) = seen.pipeline.expected, (seen.logits[0], seen.logits[-1])
    few = min(seen.steps / 20, len(seen.logits) - 1) < 1
    if expected.groups is None or expected.optimizer != "AdamW" or not start or few or seen.missed:
        raise NotApplicable("no logits are expected to move, or too few steps were seen")
    parts: list[str] = []
    likely: list[str] = []
    for leaf, weight in (("logit_dz", expected.lambda_dz), ("logit_bit", expected.lambda_bit)):
        members = [n for n in start if n.endswith(leaf) and n in seen.learnable]
        rate, decay = expected.groups[leaf].learning_rate, expected.groups[leaf].decay
        if not members or not rate:
            continue
        fell = [(abs(start[n]) - abs(end[n])) / (rate * seen.steps) for n in members]
        sizes = [abs(start[n]) for n in members]
        parts.append(f"{leaf} fell by {_median(fell):.2f} rates a step")
        if not any(fell):
            likely += ["logits-not-in-optimizer", "logits-stuck"]
        elif max(map(abs, fell)) > 1.3 + decay * max(sizes):
            likely += ["wrong-learning-rate", "logits-rate", "wrong-decay"]
        elif (weight or 0) >= 0.005 and min(sizes) > 1 and rate * seen.steps < 0.5 and _median(fell) < 0.2:
            likely += ["logit-squares-missing", "logits-rate", "logits-direction"]
    if not parts:
        raise NotApplicable("no logit is learned")
    return Outcome("towards 0, at most 1.3 learning rates a step", "; ".join(parts), not likely, likely)


def _falls(seen: Watched) -> Outcome:
    losses = [view.record.task_loss for view in seen.recorded(2)]
    first, last = losses[0], min(losses[1:])
    if seen.first_epoch or seen.steps < FEWEST_STEPS:
        raise NotApplicable(f"{first:.2f} -> {last:.2f} in {seen.steps} steps, too few to tell")
    chance = math.log(seen.pipeline.expected.num_classes or 10)
    likely = ["labels-shuffled", "learning-rate-too-large", "learning-rate-zero", "stuck-at-chance"]
    ok = last < first and last < chance
    return Outcome(f"below {min(first, chance):.2f}", f"{first:.2f} -> {last:.2f}", ok, likely)


def _accuracies(seen: Watched, count: int) -> list[float]:
    accuracies = [view.record.accuracy for view in seen.recorded(count)]
    if any(map(math.isnan, accuracies)):
        raise NotApplicable("no accuracy is measured", "measure")
    return accuracies


def _chance(seen: Watched) -> Outcome:
    """Above what guessing gives by luck: 1/K + 4 sqrt(1/K (1 - 1/K) / N) for N test images.

    Where the best epoch is below 2/K, that could be luck all the same: the last epochs have to be above chance, too.
    """
    accuracies, classes = _accuracies(seen, 2), seen.pipeline.expected.num_classes
    best, last = max(accuracies), max(accuracies[-2:])
    if classes is None or seen.steps < FEWEST_STEPS:
        raise NotApplicable(f"{100 * best:.1f}% after {seen.steps} steps, too few to tell")
    count = len(seen.pipeline.data.test_labels) if seen.pipeline.data is not None else 0
    deviation = math.sqrt((1 / classes) * (1 - 1 / classes) / count) if count else 0.0
    floor = min(max(1.5 / classes, 1 / classes + 4 * deviation), (1 + 1 / classes) / 2)
    stuck = ["labels-shuffled", "stuck-at-chance", "learning-rate-too-large", "test-labels-wrong", "batchnorm-in-eval"]
    fell = ["accuracy-collapsed", "coefficient-too-large", "learning-rate-too-large"]
    ok = best > floor and (best > 2 / classes or last > 1 / classes + 2 * deviation)
    measured = f"{100 * best:.1f}% at best, {100 * last:.1f}% in the last two epochs"
    return Outcome(f"above {100 * floor:.1f}%", measured, ok, fell if best > floor else stuck)


def _collapse(seen: Watched) -> Outcome:
    accuracies = _accuracies(seen, 4)
    best, last = max(accuracies), max(accuracies[-2:])
    if best < 3 / (seen.pipeline.expected.num_classes or 10):
        raise NotApplicable(f"the best epoch reached {100 * best:.1f}%, which is no height to fall from")
    likely = ["accuracy-collapsed", "coefficient-too-large"]
    if any(view.record.coefficient > 0 for view in seen.views[accuracies.index(best) :]):
        likely.reverse()
    likely += ["penalty-dominates", "learning-rate-too-large"]
    measured = f"{100 * best:.1f}% at best, {100 * last:.1f}% in the last two epochs"
    return Outcome(f"above {50 * best:.0f}%, half of the best", measured, last > best / 2, likely)


def _alive(seen: Watched) -> Outcome:
    last = seen.recorded()[-1]
    if not last.counted:
        raise NotApplicable("no layer is quantized")
    dead = last.dead_layers
    expected, measured = "a live filter in every layer", names(dead) or "all live"
    return Outcome(expected, measured, not dead, ["layer-died", "coefficient-too-large"])


def _applied(epoch: EpochSteps) -> Iterator[float]:
    """The coefficient that each step's losses hold, where a penalty is told."""
    for total, task, logits, groups, _ in epoch.read():
        if groups > 0:
            yield (total - task - logits) / groups


def _alike(a: Tensor, b: Tensor) -> bool:
    return len(a) >= FEWEST_LABELS and len(a.unique()) > 1 and a.shape == b.shape and torch.equal(a, b)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


Check = Callable[[Watched], Outcome]
_CHECKS: tuple[tuple[str, str, Check], ...] = (
    ("training runs", "no error, and every loss is finite", _finite),
    ("epochs are whole", "every epoch has its steps and images, in an order of its own", _whole),
    ("records follow the epochs", "each record describes the network as its epoch left it", _records),
    ("epochs go on", "an epoch starts where the one before it ended", _goes_on),
    ("all keep moving", "whatever should learn moves in every epoch", _moves),
    ("optimizer goes on", "its moments and its count of updates are kept from epoch to epoch", _counts),
    ("coefficient applied", "the penalty's weight follows its schedule", _coefficient),
    ("learning rate applied", "the weights' learning rate follows its schedule", _rate),
    ("BatchNorm learns", "its statistics are updated in every step", _norm_statistics),
    ("logits move", "dead zones open and bits fall, no faster than the optimizer can", _logit_movement),
    ("the loss falls", "the network learns its training set", _falls),
    ("above chance", "the test accuracy leaves chance", _chance),
    ("no collapse", "accuracy does not break down", _collapse),
    ("no layer dies", "every layer keeps a live filter", _alive),
)


def training_checks(runner: CheckRunner, seen: Watched) -> None:
    """Add the findings of what was seen."""
    for name, proves, check in _CHECKS:
        runner.check(name, proves, check, seen)
