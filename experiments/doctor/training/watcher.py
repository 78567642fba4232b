"""A watcher that is told of every step and every epoch's record, and looks at the network in between.

It changes nothing. The first steps of a run say nothing of its hundredth, so one step of every epoch is taken apart:
before it the network and its optimizer are copied, then the copy says which loss, gradient and update that step should
have had, on the batch drawn a second time from the loader. Axis letters: N batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.doctor.checks.step import gradient_fits, loss_fits, modes_of_network, squared_logits, update_by_rule
from experiments.doctor.expected import LOGITS, kind_of
from experiments.doctor.observe import (
    Norm,
    Steps,
    StepTrace,
    compute_again,
    equal_tensors,
    gradients_left,
    other_images,
    state_of_parts,
    watching_step,
)
from experiments.doctor.pipeline import Batch, Pipeline, step_losses
from experiments.doctor.report import TRAINING, Report
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, preserve_state
from experiments.doctor.training.records import EpochView, StepMeans, few_right
from experiments.doctor.training.training_checks import EpochSteps, Gap, Watched, training_checks
from src.training import EpochRecord, Step, StepLosses

SPREAD = 8  # the step that is taken apart is among the first SPREAD of its epoch, another one in every epoch
SLOW = 1e-3  # of its fastest learning rate; below it a parameter may stand still
VISIBLE = 1e-5  # of a parameter's length, in an epoch
State = dict[str, Tensor]


class Watcher:
    """Tell it `step(epoch, step)` after each update and `epoch(record)` after each epoch; then ask for `report()`.

    It may be made in mid-run, and miss steps, as where an interrupted run goes on: what then cannot be known (means
    over all steps of an epoch, the updates of BatchNorm's statistics, the way of the logits) is not judged.
    every_step: whether it is told of all steps, so that one that does not come was not made.
    """

    def __init__(self, pipeline: Pipeline, *, every_step: bool = False) -> None:
        self.pipeline, model = pipeline, pipeline.model
        learnable = tuple(name for name, p in model.named_parameters() if p.requires_grad)
        self.seen = Watched(pipeline, logits=[_logits(model)], learnable=learnable)
        self._every_step, self._next = every_step, (0, 0)  # epoch and index of the step that comes next
        self._kinds = {id(p): kind_of(name) for name, p in model.named_parameters()}
        self._heard: Tensor | None = None
        self._last_rate = math.nan
        self._norms = {m: int(m.num_batches_tracked) for m in _counting_norms(model)}
        self._edges, self._replay = _Edges(self.seen), _Replay(pipeline)

    def listening(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with a step whose labels the watcher hears."""
        step = pipeline.step

        def heard(model: Any, optimizer: Any, images: Tensor, labels: Tensor, *rest: Any) -> Any:
            self._heard = labels
            return step(model, optimizer, images, labels, *rest)

        return replace(pipeline, step=heard)

    def step(self, epoch: int, step: Step) -> None:
        """After an update; `epoch` from 0."""
        seen, start = self.seen, step.index == 0
        missed = (epoch, step.index) != self._next and not self._every_step
        if missed:
            seen.missed = True
            self._edges.interrupted()
        if not seen.epochs or seen.epochs[-1].number != epoch:
            seen.epochs.append(EpochSteps(epoch, whole=True))
        now = seen.epochs[-1]
        now.whole &= not missed or start
        self._next = (epoch, step.index + 1) if step.index + 1 < step.steps else (epoch + 1, 0)
        seen.steps += 1
        now.images += step.images
        parts = step.losses
        losses = [parts.total, parts.task, parts.logits, parts.groups, parts.correct.to(parts.total.dtype)]
        now.losses.append(torch.stack(losses).detach().float())
        if self._heard is not None:
            now.labels.append(self._heard)
            self._heard = None
        done = (epoch + step.index / max(step.steps, 1)) / (self.pipeline.expected.epochs or 1)
        groups = [g for g in getattr(self.pipeline.optimizer, "param_groups", []) if "lr" in g]
        for kind, rate in {(self._kinds.get(id(p), "weights"), float(g["lr"])) for g in groups for p in g["params"]}:
            if kind in LOGITS:
                seen.logit_rates.setdefault(kind, set()).add(rate)
            else:
                now.rates.append((done, rate))
        self._last_rate = float(groups[0]["lr"]) if groups and seen.own else math.nan
        self._edges.step(now, step)
        self._replay.step(epoch, step)

    def epoch(self, record: EpochRecord) -> None:
        """After an epoch was measured and before the next one starts."""
        seen, means = self.seen, None
        if seen.epochs and not seen.epochs[-1].over:
            last = seen.epochs[-1]
            last.over = True
            last.whole &= self._every_step or self._next == (last.number + 1, 0)
            means = StepMeans.of(last.read(), last.images) if last.whole else None
        right = None if seen.views else few_right(self.pipeline)  # and of the last epoch, in `report`
        known = {"means": means, "right": right, "rate": self._last_rate}
        seen.views.append(EpochView.of(self.pipeline, record, **known))
        seen.logits.append(_logits(self.pipeline.model))

    def failed(self, error: BaseException, cause: str) -> None:
        """Training stopped with an error."""
        self.seen.raised = (f"{type(error).__name__}: {error}"[:300], cause)

    def report(self) -> Report:
        """What was seen so far."""
        seen = self.seen
        if seen.views and seen.views[-1].right is None and all(epoch.over for epoch in seen.epochs):
            seen.views[-1] = replace(seen.views[-1], right=few_right(self.pipeline))
        seen.norm_updates = []
        for norm, count in self._norms.items():
            learns = any(p.requires_grad for p in norm.parameters())
            seen.norm_updates.append((int(norm.num_batches_tracked) - count, learns))
        self._edges.close()
        runner = CheckRunner(TRAINING, self.pipeline)
        training_checks(runner, seen)
        self._replay.add(runner)
        return runner.report()


class _Edges:
    """The network at the edges of its epochs: what moved within one, and what changed from one to the next."""

    def __init__(self, seen: Watched) -> None:
        self._seen, self._model = seen, seen.pipeline.model
        self._moved: set[str] = set()  # visibly, in an epoch that is over
        self._start: State | None = _state(self._model)  # at the beginning of the epoch, where that was seen
        self._last: State | None = None  # at the end of the epoch before
        self._count, self._fastest, self._way, self._number = -1, 0.0, 0.0, 0
        self._hook: Any = None

    def interrupted(self) -> None:
        """Steps were missed: the next epoch that is seen whole is compared again."""
        self._start = self._last = None
        self._count = -1
        self.close()

    def close(self) -> None:
        """No longer wait for the next epoch's first pass."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def step(self, epoch: EpochSteps, step: Step) -> None:
        """After an update."""
        optimizer = self._seen.pipeline.optimizer
        if step.index == 0:
            self.close()
            count = _updates(optimizer)
            if min(self._count, count) >= 0:
                self._seen.counts.append((count, self._count + 1))
            self._fastest = max(self._fastest, _rate(optimizer))
        if step.index + 1 < step.steps:
            return
        now, start = _state(self._model), self._start
        known = [n for n in self._seen.learnable if n in now and start and start[n].shape == now[n].shape]
        if start is not None:
            if _rate(optimizer) > SLOW * self._fastest:
                epoch.still = self._still(start, now, known)
            self._way = _length([now[n] - start[n] for n in known])
        self._start, self._last, self._count, self._number = None, now, _updates(optimizer), epoch.number + 1
        self.close()
        self._hook = self._model.register_forward_pre_hook(self._look)

    def _still(self, start: State, now: State, known: list[str]) -> list[str]:
        """What stood still. What never moved visibly may have a gradient of rounding errors, as a bias before BatchNorm
        has."""
        still = [n for n in known if torch.equal(start[n], now[n])]
        frozen = {n for n, p in self._model.named_parameters() if not p.requires_grad}
        suspect = [n for n in still if len(still) == len(known) or n in self._moved | frozen]
        self._moved |= {n for n in known if float((now[n] - start[n]).norm()) > VISIBLE * float(start[n].norm())}
        return suspect

    def _look(self, module: nn.Module, inputs: Any) -> None:
        """Observe the network when it next runs in training."""
        real = bool(inputs) and type(inputs[0]) is Tensor
        if module is not self._model or not real or not torch.is_grad_enabled() or not module.training:
            return
        self._start, before = (now := _state(module)), self._last or {}
        changed = [n for n in now if n not in before or not equal_tensors(before[n], now[n])]
        jump = _length([now[n] - before[n] for n in self._seen.learnable if n in changed and n in before])
        self._seen.gaps.append(Gap(self._number, changed, jump, self._way))
        self.close()


Check = Callable[[Steps, Pipeline], Outcome]
_TAKEN_APART: tuple[tuple[str, str, Check, bool], ...] = (  # name, what it proves, check, whether it needs the batch
    ("mode in mid-run", "BatchNorm and quantizers stay on while training", modes_of_network, False),
    ("loss in mid-run", "a step of every epoch has the expected loss", loss_fits, True),
    ("gradient in mid-run", "a step of every epoch has the gradient of the cross entropy", gradient_fits, True),
    ("squared logits in mid-run", "lambda theta^2 of every logit stays in the loss", squared_logits, True),
    ("update in mid-run", "parameters keep moving as the optimizer's rule says", update_by_rule, False),
)


@dataclass
class _Armed:
    """What was put aside before a step: copies of network and optimizer, and the hooks that watch."""

    place: tuple[int, int]  # epoch, index
    twin: Pipeline
    seen: StepTrace
    hooks: ExitStack
    left: dict[str, Tensor | None]  # the gradients of the step before


class _Replay:
    """Takes one step of every epoch apart."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._found: dict[str, list[tuple[int, Outcome]]] = {name: [] for name, *_ in _TAKEN_APART}
        self._armed: _Armed | None = None
        self._reason = "no step was taken apart"

    def step(self, epoch: int, step: Step) -> None:
        """After an update; takes it apart where it was the chosen one, and prepares for the next."""
        armed, self._armed = self._armed, None
        if armed is not None:
            armed.hooks.close()
            if armed.place == (epoch, step.index):
                self._take_apart(armed, step)
        chosen = 1 + 3 * epoch % max(1, min(step.steps - 1, SPREAD))
        if step.index + 1 == chosen < step.steps:
            self._arm(epoch, chosen)

    def add(self, runner: CheckRunner) -> None:
        """Add one finding a check: of the first epoch that shows a fault, or of all."""
        if self._armed is not None:
            self._armed.hooks.close()
        for name, proves, *_ in _TAKEN_APART:
            runner.check(name, proves, self._outcome, name)

    def _outcome(self, name: str) -> Outcome:
        found = self._found[name]
        if not found:
            raise NotApplicable(self._reason)
        for epoch, outcome in found:
            if not outcome.ok:
                return replace(outcome, measured=f"epoch {epoch + 1}: {outcome.measured}")
        last = found[-1][1]
        return replace(last, measured=f"{len(found)} epochs; in the last {last.measured}")

    def _arm(self, epoch: int, index: int) -> None:
        try:
            model, optimizer = copy.deepcopy((self._pipeline.model, self._pipeline.optimizer))
        except Exception as error:  # a network or an optimizer of one's own that cannot be copied
            self._reason = f"network and optimizer cannot be copied: {type(error).__name__}"
            return
        seen, hooks = StepTrace(), ExitStack()
        seen.before, left = state_of_parts(self._pipeline.model), gradients_left(self._pipeline.model)
        hooks.enter_context(watching_step(self._pipeline, seen))
        self._armed = _Armed(
            (epoch, index), replace(self._pipeline, model=model, optimizer=optimizer), seen, hooks, left
        )

    def _take_apart(self, armed: _Armed, step: Step) -> None:
        seen, twin = armed.seen, armed.twin
        seen.after = state_of_parts(self._pipeline.model)
        seen.returned, seen.losses = step.losses, step_losses(step.losses)
        # The loop sets learning rates between the copy and the update; whether they are right is checked elsewhere.
        groups = [getattr(each, "param_groups", []) for each in (twin.optimizer, self._pipeline.optimizer)]
        for copied, group in zip(*groups, strict=False):
            copied["lr"] = group.get("lr")
        if not any(g is not None for g in seen.gradients.values()):  # as in `watched_step`
            seen.gradients = gradients_left(self._pipeline.model)
        try:
            with preserve_state(self._pipeline):
                nothing = torch.zeros(0)
                self._judge(armed, Steps(nothing, nothing, twin, plain=seen), with_batch=False)
                batch = self._drawn_again(*armed.place)
                if batch is not None:
                    steps = Steps(*batch, twin, plain=seen, given=_applied(twin, seen.losses, armed.place[0]))
                    compute_again(steps)
                    self._judge(armed, steps, with_batch=True)
                    self._explain_left(armed, steps)
        except NotApplicable as reason:
            self._reason = str(reason)
        except Exception as error:  # what cannot be computed a second time is not judged
            self._reason = f"the step could not be computed again: {type(error).__name__}: {error}"

    def _drawn_again(self, epoch: int, index: int) -> Batch | None:
        """The step's batch, where the loader gives the same one whenever it is asked."""
        draws = [self._pipeline.first_batches(index + 1, epoch) for _ in range(2)]
        if min(map(len, draws)) <= index:
            return None
        (images, labels), (again, _) = (draw[index] for draw in draws)
        if other_images(images, again):
            return None
        return images.to(self._pipeline.device), labels.to(self._pipeline.device)

    def _judge(self, armed: _Armed, steps: Steps, with_batch: bool) -> None:
        for name, _, check, needs_batch in _TAKEN_APART:
            shown = any(not outcome.ok for _, outcome in self._found[name])  # the first epoch's is told
            if check is update_by_rule and not armed.seen.updates and self._pipeline.expected.config is None:
                self._reason = "the step made no update, as where gradients are added up"
            elif needs_batch == with_batch and not shown:
                try:
                    self._found[name].append((armed.place[0], check(steps, armed.twin)))
                except NotApplicable as reason:
                    self._reason = str(reason)

    def _explain_left(self, armed: _Armed, steps: Steps) -> None:
        """Name gradients that add up, where without those that the step before left the gradient fits."""
        for name in ("gradient in mid-run", "squared logits in mid-run"):
            failed = [outcome for epoch, outcome in self._found[name] if epoch == armed.place[0] and not outcome.ok]
            if not failed:
                continue
            pairs = {n: (g, armed.left.get(n)) for n, g in armed.seen.gradients.items()}
            fresh = {n: g if g is None or old is None else g - old for n, (g, old) in pairs.items()}
            again = replace(steps, plain=replace(armed.seen, gradients=fresh), explained=None)
            if gradient_fits(again, armed.twin).ok:
                named = replace(failed[0], likely=["gradients-accumulate", *failed[0].likely])
                self._found[name][-1] = armed.place[0], named


def _applied(pipeline: Pipeline, losses: StepLosses, epoch: int) -> float:
    """The coefficient that the step's own losses hold; whether it is the expected one is checked elsewhere."""
    expected = pipeline.expected.coefficients
    if expected is None or epoch >= len(expected):
        raise NotApplicable("the objective is not expected")
    total, task, logits, groups = (float(part) for part in (losses.total, losses.task, losses.logits, losses.groups))
    return (total - task - logits) / groups if groups > 0 else expected[epoch]


def _logits(model: nn.Module) -> dict[str, float]:
    """All logits by name, learned or not."""
    named = model.named_parameters()
    return {name: float(p.detach()) for name, p in named if name.rpartition(".")[2] in LOGITS and p.numel() == 1}


def _counting_norms(model: nn.Module) -> list[Any]:
    """BatchNorms that count the updates of their statistics."""
    return [m for m in model.modules() if isinstance(m, Norm) and m.num_batches_tracked is not None]


def _state(model: nn.Module) -> State:
    """Copies of all parameters and buffers, where they are."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _length(tensors: list[Tensor]) -> float:
    """2-norm over all of them together."""
    return float(torch.stack([each.norm() for each in tensors]).norm()) if tensors else 0.0


def _updates(optimizer: Any) -> int:
    """How many updates a torch optimizer has counted for its first parameter; -1 where it counts none."""
    state = getattr(optimizer, "state", None) or {}
    found = [entry["step"] for entry in state.values() if isinstance(entry, dict) and "step" in entry]
    return max((int(count) for count in found[:1]), default=-1)


def _rate(optimizer: Any) -> float:
    """The smallest learning rate of an optimizer with groups, otherwise 1."""
    return min((float(g["lr"]) for g in getattr(optimizer, "param_groups", []) if "lr" in g), default=1.0)
