"""One step of every epoch taken apart, while the run goes on: is it still the step that was expected?

The first steps of a run say nothing of its hundredth. So before one step of each epoch the network and its optimizer
are copied; the step is watched; then the copy says which loss, gradient and update that step should have had. The batch
is drawn a second time from the loader. The run itself is only looked at. Axis letters: N batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from experiments.doctor.checks.step import gradient_fits, loss_fits, modes_of_network, squared_logits, update_by_rule
from experiments.doctor.observe import (
    Steps,
    StepTrace,
    compute_again,
    gradients_left,
    other_images,
    state_of_parts,
    watching_step,
)
from experiments.doctor.pipeline import Batch, Pipeline, step_losses
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, preserve_state
from src.training import Step, StepLosses

SPREAD = 8  # the step that is taken apart is among the first SPREAD of its epoch, another one in every epoch
CHECKS = {
    "mode in mid-run": "BatchNorm and quantizers stay on while training",
    "loss in mid-run": "a step of every epoch has the expected loss",
    "gradient in mid-run": "a step of every epoch has the gradient of the cross entropy",
    "squared logits in mid-run": "lambda theta^2 of every logit stays in the loss",
    "update in mid-run": "parameters keep moving as the optimizer's rule says",
}


Check = Callable[[Steps, Pipeline], Outcome]
_WITHOUT_BATCH: Mapping[str, Check] = {"mode in mid-run": modes_of_network, "update in mid-run": update_by_rule}
_WITH_BATCH: Mapping[str, Check] = {
    "loss in mid-run": loss_fits,
    "gradient in mid-run": gradient_fits,
    "squared logits in mid-run": squared_logits,
}
_NOTHING = torch.zeros(0)


@dataclass
class _Armed:
    """What was put aside before a step: copies of network and optimizer, and the hooks that watch."""

    epoch: int
    index: int
    twin: Pipeline
    seen: StepTrace
    hooks: ExitStack


class Replay:
    """Tell it `step(epoch, step)` after every update; `add(runner)` gives the findings."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.found: dict[str, list[tuple[int, Outcome]]] = {name: [] for name in CHECKS}
        self._armed: _Armed | None = None
        self._reason = "no step was taken apart"

    def step(self, epoch: int, step: Step) -> None:
        """After an update; takes it apart where it was the chosen one, and prepares for the next."""
        armed, self._armed = self._armed, None
        if armed is not None:
            armed.hooks.close()
            if (armed.epoch, armed.index) == (epoch, step.index):
                self._take_apart(armed, step)
        chosen = 1 + 3 * epoch % max(1, min(step.steps - 1, SPREAD))
        if step.index + 1 == chosen < step.steps:
            self._arm(epoch, chosen)

    def add(self, runner: CheckRunner) -> None:
        """Add one finding a check: of the first epoch that shows a fault, or of all."""
        if self._armed is not None:
            self._armed.hooks.close()
        for name, proves in CHECKS.items():
            runner.check(name, proves, self._outcome, name)

    def _outcome(self, name: str) -> Outcome:
        found = self.found[name]
        if not found:
            raise NotApplicable(self._reason)
        for epoch, outcome in found:
            if not outcome.ok:
                return replace(outcome, measured=f"epoch {epoch + 1}: {outcome.measured}")
        last = found[-1][1]
        return replace(last, measured=f"{len(found)} epochs; in the last {last.measured}")

    def _arm(self, epoch: int, index: int) -> None:
        try:
            model, optimizer = copy.deepcopy((self.pipeline.model, self.pipeline.optimizer))
        except Exception as error:  # a network or an optimizer of one's own that cannot be copied
            self._reason = f"network and optimizer cannot be copied: {type(error).__name__}"
            return
        seen, hooks = StepTrace(), ExitStack()
        seen.before = state_of_parts(self.pipeline.model)
        hooks.enter_context(watching_step(self.pipeline, seen))
        twin = replace(self.pipeline, model=model, optimizer=optimizer)
        self._armed = _Armed(epoch, index, twin, seen, hooks)

    def _take_apart(self, armed: _Armed, step: Step) -> None:
        seen, twin = armed.seen, armed.twin
        seen.after = state_of_parts(self.pipeline.model)
        seen.returned, seen.losses = step.losses, step_losses(step.losses)
        _same_rates(twin.optimizer, self.pipeline.optimizer)
        if not any(g is not None for g in seen.gradients.values()):  # as in `watched_step`
            seen.gradients = gradients_left(self.pipeline.model)
        try:
            with preserve_state(self.pipeline), preserve_state(twin):
                self._judge(armed.epoch, Steps(_NOTHING, _NOTHING, twin, plain=seen), twin, _WITHOUT_BATCH)
                batch = self._drawn_again(armed)
                if batch is not None:
                    steps = Steps(*batch, twin, plain=seen, given=_applied(twin, seen.losses, armed.epoch))
                    with preserve_state(twin):
                        compute_again(steps)
                    self._judge(armed.epoch, steps, twin, _WITH_BATCH)
        except NotApplicable as reason:
            self._reason = str(reason)
        except Exception as error:  # what cannot be computed a second time is not judged
            self._reason = f"the step could not be computed again: {type(error).__name__}: {error}"

    def _drawn_again(self, armed: _Armed) -> Batch | None:
        """The step's batch, where the loader gives the same one whenever it is asked."""
        draws = [self.pipeline.first_batches(armed.index + 1, armed.epoch) for _ in range(2)]
        if min(map(len, draws)) <= armed.index:
            return None
        (images, labels), (again, _) = (draw[armed.index] for draw in draws)
        if other_images(images, again):
            return None
        device = self.pipeline.device
        return images.to(device), labels.to(device)

    def _judge(self, epoch: int, steps: Steps, twin: Pipeline, checks: Mapping[str, Check]) -> None:
        for name, check in checks.items():
            if any(not outcome.ok for _, outcome in self.found[name]):  # the first epoch is shown
                continue
            try:
                with preserve_state(twin):
                    self.found[name].append((epoch, check(steps, twin)))
            except NotApplicable as reason:
                self._reason = str(reason)


def _applied(pipeline: Pipeline, losses: StepLosses, epoch: int) -> float:
    """The coefficient that the step's own losses hold; whether it is the expected one is checked elsewhere."""
    expected = pipeline.expected.coefficients
    if expected is None or epoch >= len(expected):
        raise NotApplicable("the objective is not expected")
    total, task, logits, groups = (float(part) for part in (losses.total, losses.task, losses.logits, losses.groups))
    return (total - task - logits) / groups if groups > 0 else expected[epoch]


def _same_rates(twin: Any, optimizer: Any) -> None:
    """The loop sets learning rates between the copy and the update; whether they are right is checked elsewhere."""
    pairs = zip(getattr(twin, "param_groups", []), getattr(optimizer, "param_groups", []), strict=False)
    for copied, group in pairs:
        copied["lr"] = group.get("lr")
