"""Whether an epoch goes on from where the one before it ended, and whether all that should learn keeps moving.

In the project's own pipeline nothing changes between two epochs: the first forward pass of an epoch finds every
parameter and every statistic as the last step left it, bit for bit. A pipeline of one's own may do as it likes there,
as long as it does not jump: its first step of an epoch moves the weights at most MOST times as far as its second.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from experiments.doctor.expected import kind_of
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, names
from src.training import Step

MOST = 10.0  # times the second step; Adam's steps differ by less than a factor of 3
SLOW = 1e-3  # of its first learning rate; below it a parameter may stand still
VISIBLE = 1e-5  # of a parameter's length, in an epoch
State = dict[str, Tensor]


class Continuity:
    """Tell it `step(step)` after each update and `epoch_done()` before the next epoch starts; `add(runner)` judges."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self._model = pipeline, pipeline.model
        self.jumps: list[tuple[float, float]] = []  # length of the first and of the second step of epochs 2, 3, ...
        self.changed: list[list[str]] = []  # what changed between two epochs
        self.still: list[list[str]] = []  # what should learn and did not move in an epoch
        self.counts: list[tuple[int, int]] = []  # the optimizer's own count of updates, and the one that follows
        self._learnable = [name for name, p in self._model.named_parameters() if p.requires_grad]
        self._start: State | None = _state(self._model)  # at the beginning of the epoch, where that was seen
        self._moved: set[str] = set()
        self._last: State | None = None  # after the last step that was seen
        self._held: State | None = None
        self._first, self._count, self._hook = 0.0, -1, _no_hook
        self._rate = 0.0
        self._fastest = 0.0

    def interrupted(self) -> None:
        """Steps were missed: the next epoch that is seen whole is compared again."""
        self._start = self._last = self._held = None
        self._count = -1
        self._hook()

    def step(self, step: Step) -> None:
        """After an update."""
        if step.index == 0:
            self._hook()
            count = _updates(self._pipeline.optimizer)
            if min(self._count, count) >= 0:
                self.counts.append((count, self._count + 1))
            self._rate = _rate(self._pipeline.optimizer)
            self._fastest = max(self._fastest, self._rate)
        if self._held is not None and step.index <= 1:
            now = _state(self._model)
            length = _distance(self._held, now, self._learnable)
            if step.index == 0:
                self._first, self._held = length, now
            else:
                self.jumps.append((self._first, length))
                self._held = None
        if step.index + 1 == step.steps:
            self._epoch_over()

    def _epoch_over(self) -> None:
        now = _state(self._model)
        if self._start is not None and self._rate > SLOW * self._fastest:
            known = [n for n in self._learnable if n in now]
            still = [n for n in known if torch.equal(self._start[n], now[n])]
            frozen = {n for n, p in self._model.named_parameters() if not p.requires_grad}
            # What never moved visibly may have a gradient of rounding errors, as a bias before BatchNorm has.
            self.still.append([n for n in still if len(still) == len(known) or n in self._moved | frozen])
            self._moved |= {n for n in known if _share(self._start[n], now[n]) > VISIBLE}
        self._last, self._count = now, _updates(self._pipeline.optimizer)
        self._start = None
        self._hook = self._at_next_pass()

    def epoch_done(self) -> None:
        """After an epoch was measured and before the next one starts."""
        self._held = self._last

    def _at_next_pass(self) -> Any:
        """Observe the network when it next runs in training; returns what removes the hook."""

        def look(module: nn.Module, inputs: Any) -> None:
            real = bool(inputs) and type(inputs[0]) is Tensor
            if module is not self._model or not real or not torch.is_grad_enabled() or not module.training:
                return
            now, last = _state(module), self._last
            if last is not None:
                self.changed.append([n for n in now if n not in last or not _same(last[n], now[n])])
            self._start = now
            handle.remove()

        handle = self._model.register_forward_pre_hook(look)
        return handle.remove

    def add(self, runner: CheckRunner) -> None:
        """Add the findings."""
        self._hook()
        runner.check("epochs go on", "an epoch starts where the one before it ended", self._goes_on)
        runner.check("all keep moving", "whatever should learn moves in every epoch", self._moves)
        runner.check(
            "optimizer goes on", "its moments and its count of updates are kept from epoch to epoch", self._counts
        )

    def _goes_on(self) -> Outcome:
        exact = self._pipeline.expected.config is not None
        if exact and self.changed:
            for place, odd in enumerate(self.changed, 2):
                if odd:
                    weights = [n for n in odd if n in self._learnable]
                    measured = f"{names(weights or odd)} changed before epoch {place} began"
                    likely = ["weights-reset", "changes-too-much"] if weights else ["evaluation-changes-model"]
                    return Outcome("nothing changes between two epochs", measured, False, likely)
        if not self.jumps:
            raise NotApplicable("this needs a second epoch of two steps or more")
        ratio, place = max((first / max(second, 1e-12), n) for n, (first, second) in enumerate(self.jumps, 2))
        ok = ratio <= MOST or self.jumps[place - 2][0] < 1e-9
        measured = f"the first step of epoch {place} moves the weights {ratio:.2g} times as far as its second"
        return Outcome(f"at most {MOST:g} times", measured, ok, ["weights-reset", "changes-too-much"], ratio / MOST)

    def _moves(self) -> Outcome:
        if not self.still:
            raise NotApplicable("this needs an epoch that was seen from its beginning to its end")
        count = len(self._learnable)
        for place, still in enumerate(self.still, 1):
            if still:
                now = dict(self._model.named_parameters())
                frozen = [n for n in still if n in now and not now[n].requires_grad]
                logits = all(kind_of(n) != "weights" for n in still)
                likely = ["no-update" if len(still) == count else None, "parameter-frozen" if frozen else None]
                likely += ["logits-stuck" if logits else "gradient-missing"]
                return Outcome(f"all {count}", f"{names(still)} stood still in epoch {place}", False, likely)
        return Outcome(f"all {count}", f"all moved in each of {len(self.still)} epochs", True)

    def _counts(self) -> Outcome:
        if not self.counts:
            raise NotApplicable("the optimizer keeps no count, or no second epoch was seen")
        odd = [(count, meant) for count, meant in self.counts if count != meant]
        measured = f"{odd[0][0]} updates counted for {odd[0][1]}" if odd else f"in {len(self.counts)} epochs"
        return Outcome("one update more than before the epoch", measured, not odd, ["optimizer-reset", "no-update"])


def _no_hook() -> None: ...


def _state(model: nn.Module) -> State:
    """Copies of all parameters and buffers, where they are."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


def _share(before: Tensor, now: Tensor) -> float:
    """How far a parameter moved, as a share of its length."""
    return float((now - before).norm() / before.norm().clamp(min=1e-12)) if before.shape == now.shape else math.inf


def _distance(before: State, now: State, learnable: list[str]) -> float:
    """2-norm over all learnables together."""
    if any(n not in now or n not in before or before[n].shape != now[n].shape for n in learnable) or not learnable:
        return float("inf")
    return float(torch.stack([(before[n] - now[n]).norm() for n in learnable]).norm())


def _updates(optimizer: Any) -> int:
    """How many updates a torch optimizer has counted for its first parameter; -1 where it counts none."""
    state = getattr(optimizer, "state", None) or {}
    found = [entry["step"] for entry in state.values() if isinstance(entry, dict) and "step" in entry]
    return max((int(count) for count in found[:1]), default=-1)


def _rate(optimizer: Any) -> float:
    """The smallest learning rate of an optimizer with groups, otherwise 1."""
    return min((float(g["lr"]) for g in getattr(optimizer, "param_groups", []) if "lr" in g), default=1.0)
