"""While training: does the network learn, and does nothing break down? Luck plays a part, so this is judged late and
loosely, from the records of the epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.doctor.pipeline import Pipeline
from experiments.doctor.records import EpochView
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, names

FEWEST_STEPS = 60  # updates below which accuracy is not judged


def learning_checks(
    runner: CheckRunner, pipeline: Pipeline, views: Sequence[EpochView], steps: int, first_epoch: int
) -> None:
    """Add the findings about loss, accuracy and layers. steps: updates that were seen; first_epoch: from 0."""
    classes = pipeline.expected.num_classes
    runner.check("the loss falls", "the network learns its training set", _falls, views, steps, first_epoch, classes)
    runner.check("above chance", "the test accuracy leaves chance", _chance, views, steps, classes)
    runner.check("no collapse", "accuracy does not break down", _collapse, views, classes)
    runner.check("no layer dies", "every layer keeps a live filter", _alive, views)


def _enough(views: Sequence[EpochView], count: int) -> None:
    if len(views) < count:
        raise NotApplicable(f"{len(views)} epochs were recorded; this needs {count}")


def _accuracies(views: Sequence[EpochView], count: int) -> list[float]:
    _enough(views, count)
    accuracies = [view.record.accuracy for view in views]
    if any(map(math.isnan, accuracies)):
        raise NotApplicable("no accuracy is measured", "measure")
    return accuracies


def _falls(views: Sequence[EpochView], steps: int, first_epoch: int, classes: int | None) -> Outcome:
    _enough(views, 2)
    first, last = views[0].record.task_loss, min(view.record.task_loss for view in views[1:])
    if first_epoch:
        raise NotApplicable(f"the watch began with epoch {first_epoch + 1}")
    if steps < FEWEST_STEPS:
        raise NotApplicable(f"{first:.2f} -> {last:.2f} in {steps} steps, too few to tell")
    chance = math.log(classes or 10)
    ok = last < first and last < chance
    likely = ["labels-shuffled", "learning-rate-too-large", "learning-rate-zero", "stuck-at-chance"]
    return Outcome(f"below {min(first, chance):.2f}", f"{first:.2f} -> {last:.2f}", ok, likely)


def _chance(views: Sequence[EpochView], steps: int, classes: int | None) -> Outcome:
    best = max(_accuracies(views, 2))
    if classes is None or steps < FEWEST_STEPS:
        raise NotApplicable(f"{100 * best:.1f}% after {steps} steps, too few to tell")
    floor = min(1.5 / classes, (1 + 1 / classes) / 2)
    likely = ["labels-shuffled", "stuck-at-chance", "learning-rate-too-large"]
    likely += ["test-labels-wrong", "batchnorm-in-eval"]
    return Outcome(f"above {100 * floor:.0f}%", f"{100 * best:.1f}% at best", best > floor, likely)


def _collapse(views: Sequence[EpochView], classes: int | None) -> Outcome:
    accuracies = _accuracies(views, 4)
    best, last = max(accuracies), max(accuracies[-2:])
    if best < 3 / (classes or 10):
        raise NotApplicable(f"the best epoch reached {100 * best:.1f}%, which is no height to fall from")
    likely = ["accuracy-collapsed", "coefficient-too-large", "penalty-dominates", "learning-rate-too-large"]
    fell = accuracies.index(best)
    if any(view.record.coefficient > 0 for view in views[fell:]):
        likely = ["coefficient-too-large", "accuracy-collapsed", "penalty-dominates", "learning-rate-too-large"]
    measured = f"{100 * best:.1f}% at best, {100 * last:.1f}% in the last two epochs"
    return Outcome(f"above {50 * best:.0f}%, half of the best", measured, last > best / 2, likely)


def _alive(views: Sequence[EpochView]) -> Outcome:
    _enough(views, 1)
    last = views[-1]
    if not last.counted:
        raise NotApplicable("no layer is quantized")
    dead = last.dead_layers
    expected, measured = "a live filter in every layer", names(dead) or "all live"
    return Outcome(expected, measured, not dead, ["layer-died", "coefficient-too-large"])
