"""While training: a watcher that is told of every step and every epoch's record, and looks at the network in between.

It changes nothing. What it can know for certain (the learning rate, the coefficient that a step really applied, the
record against the network) it compares exactly; what depends on luck (accuracy, collapse) it judges late and loosely.
Axis letters: O output channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.doctor.checks.penalty import coefficient_outcome
from experiments.doctor.expected import LOGITS, factor_of, kind_of
from experiments.doctor.network.learning_checks import learning_checks
from experiments.doctor.pipeline import Pipeline, is_plain
from experiments.doctor.records import EpochView, StepMeans, few_right, records_outcome
from experiments.doctor.report import TRAINING, Report
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, names
from experiments.doctor.training.continuity import Continuity
from experiments.doctor.training.replay import Replay
from src.training import EpochRecord, Step


class Watcher:
    """Tell it `step(epoch, step)` after each update and `epoch(record)` after each epoch; then ask for `report()`.

    It may be made in mid-run, and miss steps, as where an interrupted run goes on: what then cannot be known (means
    over all steps of an epoch, the updates of BatchNorm's statistics, the way of the logits) is not judged.
    """

    def __init__(self, pipeline: Pipeline, coefficients: bool = True) -> None:
        self.pipeline = pipeline
        self.views: list[EpochView] = []
        self.losses: list[float] = []
        self.rates: list[tuple[int, float, float]] = []  # epoch, share of the run done, rate of the weights
        self.logit_rates: dict[str, set[float]] = {}  # every rate that a group of logits had
        self.applied: dict[int, list[float]] = {}
        self.logits: list[dict[str, float]] = [_logits(pipeline)]
        self.steps = 0
        self.first_epoch = 0
        self.missed = False  # whether steps were made that the watcher was not given
        self._next = (0, 0)  # epoch and index of the step that comes next where none is missed
        self._unread: list[tuple[int, Tensor]] = []  # losses that the device may still be computing
        self._epoch_losses: list[tuple[float, ...]] = []
        self._epoch_images = 0
        self._epoch_whole = False
        self.raised: tuple[str, str] | None = None
        self._learned = {name for name, p in pipeline.model.named_parameters() if p.requires_grad}
        self._kinds = {id(p): kind_of(name) for name, p in pipeline.model.named_parameters()}
        self._continuity = Continuity(pipeline)
        self._replay = Replay(pipeline)
        self._last_rate = math.nan
        self._norms = [m for m in pipeline.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        self._tracked = [int(m.num_batches_tracked) for m in self._norms if m.num_batches_tracked is not None]

    def step(self, epoch: int, step: Step) -> None:
        """After an update; `epoch` from 0."""
        if not self.steps:
            self.first_epoch = epoch
        if (epoch, step.index) != self._next:
            self.missed = True
            self._continuity.interrupted()
            self._forget_epoch()
        self._next = (epoch, step.index + 1) if step.index + 1 < step.steps else (epoch + 1, 0)
        self.steps += 1
        parts = step.losses
        reported = [parts.total, parts.task, parts.logits, parts.groups, parts.correct.to(parts.total.dtype)]
        losses = torch.stack(reported).detach().float()
        self._unread.append((epoch, losses))
        epochs = self.pipeline.expected.epochs or 1
        done = (epoch + step.index / max(step.steps, 1)) / epochs
        for kind, rate in self._rates_now():
            if kind in LOGITS:
                self.logit_rates.setdefault(kind, set()).add(rate)
            else:
                self.rates.append((epoch, done, rate))
        if self.pipeline.expected.config is not None:
            groups = getattr(self.pipeline.optimizer, "param_groups", None)
            self._last_rate = float(groups[0]["lr"]) if groups else math.nan
        self._epoch_images += step.images
        self._epoch_whole = step.index + 1 == step.steps == len(self._epoch_losses) + len(self._unread)
        self._continuity.step(step)
        self._replay.step(epoch, step)

    def _rates_now(self) -> set[tuple[str, float]]:
        """The kinds of parameters that the optimizer holds, each with the learning rates it has."""
        groups = getattr(self.pipeline.optimizer, "param_groups", [])
        if not groups or "lr" not in groups[0]:
            return set()
        return {(self._kinds.get(id(p), "weights"), float(g["lr"])) for g in groups for p in g["params"]}

    def epoch(self, record: EpochRecord) -> None:
        """After an epoch was measured and before the next one starts."""
        self._read()
        means = StepMeans.of(self._epoch_losses, self._epoch_images) if self._epoch_whole else None
        known = {"means": means, "right": few_right(self.pipeline), "rate": self._last_rate}
        self.views.append(EpochView.of(self.pipeline, record, **known))
        self._forget_epoch()
        self._continuity.epoch_done()
        self.logits.append(_logits(self.pipeline))

    def _read(self) -> None:
        """Losses as numbers. Waits for the device, hence not at every step."""
        for epoch, losses in self._unread:
            total, task, logits, groups, correct = losses.tolist()
            self.losses.append(total)
            self._epoch_losses.append((total, task, logits, groups, correct))
            if groups > 0:
                self.applied.setdefault(epoch, []).append((total - task - logits) / groups)
        self._unread = []

    def _forget_epoch(self) -> None:
        self._read()
        self._epoch_losses, self._epoch_images, self._epoch_whole = [], 0, False

    def failed(self, error: BaseException, cause: str) -> None:
        """Training stopped with an error."""
        self.raised = (f"{type(error).__name__}: {error}", cause)

    def report(self) -> Report:
        """What was seen so far."""
        self._read()
        runner = CheckRunner(TRAINING, self.pipeline)
        runner.check("training runs", "no error, and every loss is finite", self._finite)
        runner.check(
            "records follow the epochs", "each record describes the network as its epoch left it", self._records
        )
        self._continuity.add(runner)
        self._replay.add(runner)
        runner.check("coefficient applied", "the penalty's weight follows its schedule", self._coefficient)
        runner.check("learning rate applied", "the weights' learning rate follows its schedule", self._rate)
        runner.check("BatchNorm learns", "its statistics are updated in every step", self._norm_statistics)
        runner.check(
            "logits move", "dead zones open and bits fall, no faster than the optimizer can", self._logit_movement
        )
        learning_checks(runner, self.pipeline, self.views, self.steps, self.first_epoch)
        return runner.report()

    def _finite(self) -> Outcome:
        if self.raised is not None:
            text, cause = self.raised
            large = "learning-rate-too-large" if cause == "loss-not-finite" else None
            return Outcome("no error", text, False, [cause, large])
        if not self.losses and not self.views:
            raise NotApplicable("nothing was trained")
        bad = [number for number, loss in enumerate(self.losses) if not math.isfinite(loss)]
        measured = f"{self.steps} steps" + (f"; the loss of step {bad[0] + 1} is not finite" if bad else "")
        return Outcome("finite losses", measured, not bad, ["loss-not-finite", "learning-rate-too-large"])

    def _seen(self, count: int = 1) -> list[EpochView]:
        if len(self.views) < count:
            raise NotApplicable(f"{len(self.views)} epochs were recorded; this needs {count}")
        return self.views

    def _records(self) -> Outcome:
        views = self._seen()
        if all(is_plain(view.record) for view in views):
            raise NotApplicable("no record of an epoch is made", "" if self.pipeline.measure else "measure")
        return records_outcome(self.pipeline, views, self.first_epoch)

    def _coefficient(self) -> Outcome:
        expected = self.pipeline.expected.coefficients
        if expected is None:
            raise NotApplicable("no schedule is expected")
        views = self._seen()
        trained = range(self.first_epoch, self.first_epoch + len(views))
        wanted = list(expected[trained.start : trained.stop])
        recorded = [view.record.coefficient for view in views]
        outcome = coefficient_outcome(recorded, wanted, "the records say")
        if not outcome.ok or self.pipeline.objective.penalty is None or not self.applied:
            missing = (
                self.pipeline.objective.penalty is not None and not self.applied and any(wanted) and bool(self.losses)
            )
            if outcome.ok and missing:
                text = "no step's loss holds a penalty"
                return Outcome(outcome.expected, text, False, ["penalty-not-in-loss", "coefficient-never-ramps"])
            return outcome
        used = [_median(self.applied[e]) if e in self.applied else 0.0 for e in trained]
        off = [e for e, (a, b) in enumerate(zip(used, wanted, strict=True)) if abs(a - b) > 0.02 * max(b, 1e-4)]
        if not off:
            return outcome
        rounded = [b if abs(a - b) <= 0.02 * max(b, 1e-4) else a for a, b in zip(used, wanted, strict=True)]
        return coefficient_outcome(rounded, wanted, "the steps' losses hold")

    def _rate(self) -> Outcome:
        config, expected = self.pipeline.expected.config, self.pipeline.expected.groups
        if config is None or expected is None or not self.rates:
            raise NotApplicable("no learning rate is expected or none was seen")
        factor, base = factor_of(config), expected["weights"].learning_rate
        off = [
            (e, rate, base * factor(done))
            for e, done, rate in self.rates
            if abs(rate - base * factor(done)) > 1e-3 * base
        ]
        measured = f"as expected in {len(self.rates) - len(off)} of {len(self.rates)} steps"
        likely: list[str | None] = []
        if off:
            epoch, rate, meant = off[0]
            measured += f"; epoch {epoch + 1}: {rate:.3g} instead of {meant:.3g}"
            likely = [
                "learning-rate-zero" if rate == 0 else None,
                "learning-rate-too-large" if rate > 9 * base else None,
            ]
        changing = [leaf for leaf, seen in self.logit_rates.items() if len(seen) > 1]
        if changing:
            measured += f"; the rate of {names(changing)} changes, and should not"
        wanted = "base rate x the configured factor, for the weights alone"
        return Outcome(wanted, measured, not off and not changing, [*likely, "learning-rate-schedule"])

    def _norm_statistics(self) -> Outcome:
        if not self._tracked or not self.steps:
            raise NotApplicable("there is no BatchNorm, or no step was seen")
        if self.missed:
            raise NotApplicable("some steps were not seen")
        now = [int(m.num_batches_tracked) for m in self._norms if m.num_batches_tracked is not None]
        counts = [b - a for a, b in zip(self._tracked, now, strict=True)]
        ok = min(counts) == max(counts) == self.steps
        measured = f"{min(counts)} to {max(counts)} updates of the statistics"
        likely = [
            "batchnorm-in-eval" if min(counts) < self.steps else "evaluation-in-training-mode",
            "evaluation-changes-model",
        ]
        return Outcome(f"{self.steps}, one a step", measured, ok, likely)

    def _logit_movement(self) -> Outcome:
        """Adam moves a parameter by at most a few learning rates a step; squares in the loss draw it to 0 steadily."""
        expected = self.pipeline.expected
        if (
            expected.groups is None
            or expected.optimizer != "AdamW"
            or not self.logits[0]
            or min(self.steps / 20, len(self.logits) - 1) < 1
        ):
            raise NotApplicable("no logits are expected to move, or too few steps were seen")
        if self.missed:
            raise NotApplicable("some steps were not seen")
        parts, ok = list[str](), True
        likely: list[str | None] = []
        for leaf, weight in (("logit_dz", expected.lambda_dz), ("logit_bit", expected.lambda_bit)):
            members = [n for n in self.logits[0] if n.endswith(leaf) and n in self._learned]
            rate, decay = expected.groups[leaf].learning_rate, expected.groups[leaf].decay
            if not members or not rate:
                continue
            starts, ends = ([abs(logits[n]) for n in members] for logits in (self.logits[0], self.logits[-1]))
            fell = [(a - b) / (rate * self.steps) for a, b in zip(starts, ends, strict=True)]
            parts.append(f"{leaf} fell by {_median(fell):.2f} rates a step")
            if all(a == b for a, b in zip(starts, ends, strict=True)):
                ok, likely = False, [*likely, "logits-not-in-optimizer", "logits-stuck"]
            elif max(abs(f) for f in fell) > 1.3 + decay * max(starts):
                ok, likely = False, [*likely, "wrong-learning-rate", "logits-rate", "wrong-decay"]
            elif (weight or 0) >= 0.005 and min(starts) > 1 and rate * self.steps < 0.5 and _median(fell) < 0.2:
                ok, likely = False, [*likely, "logit-squares-missing", "logits-rate", "logits-direction"]
        if not parts:
            raise NotApplicable("no logit is learned")
        return Outcome("towards 0, at most 1.3 learning rates a step", "; ".join(parts), ok, likely)


def _logits(pipeline: Pipeline) -> dict[str, float]:
    """All logits by name, learned or not."""
    with torch.no_grad():
        return {
            name: float(p)
            for name, p in pipeline.model.named_parameters()
            if name.rpartition(".")[2] in LOGITS and p.numel() == 1
        }


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
