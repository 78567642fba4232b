"""Steps of a pipeline, watched: what they reported, the gradients their optimizer saw, what they changed.

Steps are taken from the same state on the same batch: one without the penalty, one again with the gradients that it
left, one with the penalty. What differs between them is what the part that differs contributes. All is put back.
Axis letters: N batch, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.doctor.causes.explain import Observables
from experiments.doctor.checks.data import good_batches
from experiments.doctor.pipeline import Pipeline, step_losses
from experiments.doctor.reference.objective import (
    Gradients,
    Grouping,
    Objective,
    channel_grouping,
    cross_entropy,
    gradients,
    plain,
    smoothed,
)
from experiments.doctor.runner import RAISED, NotApplicable, PartFailed, preserve_state
from src.pruning import GraphError
from src.training import StepLosses
from utils_quantization import FakeQuantParametrization

Norm = nn.modules.batchnorm._NormBase
IMAGES = 64
MOST_CALLS = 8  # of a step for one update, where gradients are accumulated over several


@dataclass
class StepTrace:
    """What one step did. Tensors are float64 on the CPU, by name.

    gradients: as the optimizer's update found them (None where there was none); updates: how many it made; settings: of
    each parameter's group at the first. means: what each BatchNorm saw in its first training pass, (C,).
    quantizers_off, norms_in_eval, model_in_eval: modes during a pass. passes: the images of every training pass.
    """

    losses: StepLosses | None = None
    returned: Any = None
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    updates: int = 0
    before: Gradients = field(default_factory=dict)
    after: Gradients = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    norms_in_eval: set[str] = field(default_factory=set)
    model_in_eval: bool = False
    means: dict[str, Tensor] = field(default_factory=dict)
    quantizers_off: set[str] = field(default_factory=set)
    quantizers_seen: set[str] = field(default_factory=set)
    modes_changed: bool = False
    inside: bool = False  # whether the update itself calls backward, as LBFGS does with its closure
    passes: list[Tensor] = field(default_factory=list)


def watched_step(pipeline: Pipeline, images: Tensor, labels: Tensor, coefficient: float, calls: int = 1) -> StepTrace:
    """Take one step and watch it. Raises PartFailed where the step raises. The caller restores the state.

    calls: how often the step function is called for it; the last call's losses count.
    """
    seen = StepTrace()
    seen.before = state_of_parts(pipeline.model)
    modes = {module: module.training for module in pipeline.model.modules()}
    with watching_step(pipeline, seen):
        try:
            for _ in range(calls):
                seen.returned = pipeline.take_step(images, labels, coefficient)
        except RAISED as error:
            raise PartFailed("step-raises", error) from error
    try:
        seen.losses = step_losses(seen.returned)
    except (TypeError, ValueError) as error:
        raise PartFailed("step-returns-no-loss", error) from error
    if not any(g is not None for g in seen.gradients.values()):
        # No torch optimizer, no update, or one that calls backward itself: what backward left behind.
        seen.inside = seen.updates > 0
        seen.gradients = gradients_left(pipeline.model)
    seen.after = state_of_parts(pipeline.model)
    seen.modes_changed = any(module.training != training for module, training in modes.items())
    return seen


def batch_of(pipeline: Pipeline, count: int = 128) -> tuple[Tensor, Tensor]:
    """At most `count` images of the first batch, on the network's device."""
    images, labels = good_batches(pipeline, 1)[0]
    return images[:count].to(pipeline.device), labels[:count].to(pipeline.device)


def network_batch(pipeline: Pipeline, count: int = 128) -> tuple[Tensor, Tensor]:
    """`batch_of` as the network reads it, with whole-number labels.

    Raises NotApplicable where the step prepares the images, so that what the network reads is not known.
    """
    images, labels = batch_of(pipeline, count)
    if not images.is_floating_point():
        raise NotApplicable(f"the step prepares the loader's images, which are {images.dtype}")
    return images, hard_labels(labels)


def hard_labels(labels: Tensor) -> Tensor:
    """The most likely class, (N,), of labels that are a probability a class."""
    return labels.argmax(1) if labels.dim() == 2 else labels


def state_of_parts(model: nn.Module) -> Gradients:
    """All parameters and buffers by name, float64 on the CPU."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: plain(tensor) for name, tensor in tensors.items()}


def equal_tensors(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same shape and values, on whatever device."""
    return left.shape == right.shape and torch.equal(left, right.to(left.device))


def gradients_left(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradient of every trainable parameter, None where it has none."""
    return {n: None if p.grad is None else plain(p.grad) for n, p in model.named_parameters() if p.requires_grad}


def settings_by_parameter(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """The settings of each parameter's group, by the parameter's name."""
    names = {id(p): name for name, p in pipeline.model.named_parameters()}
    groups = getattr(pipeline.optimizer, "param_groups", [])
    held = {names.get(id(p), ""): group for group in groups for p in group["params"]}
    return {name: {key: value for key, value in group.items() if key != "params"} for name, group in held.items()}


def _hook_bases(kind: type) -> None:
    """torch calls hooks in the `step` of an optimizer's own class alone; a class that wraps another's calls both."""
    for base in kind.__mro__[:-1]:
        step = vars(base).get("step")
        if step is not None and base is not torch.optim.Optimizer and not hasattr(step, "hooked"):
            hooked: Any = torch.optim.Optimizer.profile_hook_step(step)
            hooked.hooked = True
            base.step = hooked  # type: ignore[attr-defined]


@contextmanager
def watching_step(pipeline: Pipeline, seen: StepTrace) -> Iterator[None]:
    """Inside, what one step of the pipeline does is written down in `seen`."""
    handles: list[Any] = []

    def before_update(*_: Any) -> None:
        # A wrapper's step() calls the wrapped one: what that sees counts, as long as nothing has moved yet.
        own = dict(pipeline.model.named_parameters())
        if seen.updates and any(not torch.equal(plain(p), seen.before[n]) for n, p in own.items()):
            seen.updates += 1
            return
        seen.updates = 1
        seen.gradients = gradients_left(pipeline.model)
        seen.settings = settings_by_parameter(pipeline)

    if isinstance(pipeline.optimizer, torch.optim.Optimizer):
        _hook_bases(type(pipeline.optimizer))
        handles.append(pipeline.optimizer.register_step_pre_hook(before_update))

    def read(module: nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled() and inputs and isinstance(inputs[0], Tensor):
            seen.passes.append(inputs[0].detach().clone())
            seen.model_in_eval |= not module.training

    def read_norm(name: str, module: nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled() and not module.training:
            seen.norms_in_eval.add(name)
        elif torch.is_grad_enabled() and name not in seen.means:
            x = inputs[0].detach().float()
            seen.means[name] = plain(x.mean([dim for dim in range(x.dim()) if dim != 1]))

    def read_quantizer(name: str, module: Any, inputs: Any) -> None:
        layer = name.partition(".parametrizations")[0]
        if torch.is_grad_enabled():
            seen.quantizers_seen.add(layer)
            seen.quantizers_off |= set() if module.enabled else {layer}

    handles.append(pipeline.model.register_forward_pre_hook(read))
    for name, module in pipeline.model.named_modules():
        if isinstance(module, Norm | FakeQuantParametrization):
            look = read_norm if isinstance(module, Norm) else read_quantizer
            handles.append(module.register_forward_pre_hook(partial(look, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Steps:
    """The watched steps, or the error that the first one raised, and what is needed to compute them a second time.

    plain: with the penalty's coefficient `given`, 0 unless a run is watched; again: the same once more; penalised: with
    `coefficient`. calls: of the step function for one update. bare: the pipeline with a copy of its network, whose
    parameters have no hooks that change their gradients. right: the observables that `plain` should have.
    """

    images: Tensor
    labels: Tensor
    bare: Pipeline
    plain: StepTrace | None = None
    again: StepTrace | None = None
    penalised: StepTrace | None = None
    error: PartFailed | None = None
    given: float = 0.0
    coefficient: float = 0.0
    calls: int = 1
    reference: Objective | None = None
    right: Observables | None = None
    explained: list[str] | None = None

    def predict(self, objective: Objective) -> Observables:
        """Reported total and gradients by parameter of `plain`, were `objective` what it minimises."""
        seen, batch = done(self.plain), (self.images, self.labels)
        promised = self.bare.expected.lambda_dz is not None
        if not promised:  # a step may prepare its images, and may freeze BatchNorm
            batch = (seen.passes[0], self.labels)
        with preserve_state(self.bare):
            self.bare.model.train()
            for name in seen.norms_in_eval if not promised else ():
                self.bare.model.get_submodule(name).eval()
            if not objective.training:
                self.bare.model.eval()
            losses = objective.losses(self.bare.model, batch, self.given, self.bare.precision)
            slopes = objective.gradients(gradients(losses.total, self.bare.model))
            total = plain(objective.report(losses).total)
        return {"total": total, **{f"gradient of {name}": slope for name, slope in slopes.items()}}


def take_steps(pipeline: Pipeline) -> Steps:
    """The watched steps. Raises NotApplicable without a usable batch."""
    images, labels = batch_of(pipeline, IMAGES)
    steps = Steps(images, labels, without_hooks(pipeline))
    if pipeline.objective.penalty is not None:
        steps.coefficient = pipeline.expected.peak or 0.01
    with preserve_state(pipeline):
        pipeline.model.train()
        full_rates_(pipeline)
        try:
            steps.calls = _calls_for_an_update(steps, pipeline)
            steps.plain, left = _one(steps, pipeline, 0.0)
            steps.again, _ = _one(steps, pipeline, 0.0, left)
            if steps.coefficient:
                steps.penalised, _ = _one(steps, pipeline, steps.coefficient)
        except PartFailed as error:
            steps.error = error
        compute_again(steps)
    return steps


def compute_again(steps: Steps) -> None:
    """The observables that the step should have, where its objective is known or can be guessed."""
    seen, expected = steps.plain, steps.bare.expected
    if seen is None or expected.objective == "open" or steps.calls > 1:
        return
    if expected.lambda_dz is None and len(seen.passes) != 1:
        return
    try:
        grouping = grouping_of(steps.bare) if expected.penalty and steps.given else None
        steps.reference = objective_of(steps.bare, grouping)
        steps.right = steps.predict(steps.reference)
    except RAISED:  # the step itself, or the check of the network, says what is wrong
        steps.right = None


def _one(
    steps: Steps, pipeline: Pipeline, coefficient: float, left: dict[str, Tensor | None] | None = None
) -> tuple[StepTrace, dict[str, Tensor | None]]:
    """One watched step that starts with the gradients `left`; returns also those that it leaves.

    They are turned round: added to the step's own ones, they change its direction, which clipping does not undo.
    """
    with preserve_state(pipeline):
        for name, p in pipeline.model.named_parameters():
            kept = (left or {}).get(name)
            p.grad = None if kept is None else kept.flatten().flip(0).view_as(kept).clone()
        seen = watched_step(pipeline, steps.images, steps.labels, coefficient, steps.calls)
        return seen, {name: p.grad for name, p in pipeline.model.named_parameters()}


def _calls_for_an_update(steps: Steps, pipeline: Pipeline) -> int:
    """How many calls of a step with open intentions make an update; 1 also where none of the first calls makes one."""
    if pipeline.expected.groups is not None or not isinstance(pipeline.optimizer, torch.optim.Optimizer):
        return 1
    updated: list[int] = []
    with preserve_state(pipeline):
        for call in range(2 * MOST_CALLS):
            if watched_step(pipeline, steps.images, steps.labels, 0.0).updates:
                updated.append(call)
            if updated[:1] == [0]:
                return 1
            if len(updated) == 2:
                return updated[1] - updated[0]
    return 1


def full_rates_(pipeline: Pipeline) -> None:
    """Learning rates without the warm-up of a torch scheduler, where none is expected. Inside `preserve_state`."""
    for group in getattr(pipeline.optimizer, "param_groups", []) if pipeline.expected.groups is None else []:
        group["lr"] = max(group.get("lr", 0.0), group.get("initial_lr", 0.0))


def objective_of(pipeline: Pipeline, grouping: Grouping | None = None) -> Objective:
    """What is expected of a step; plain cross entropy where nothing is."""
    expected = pipeline.expected
    lambdas = {"logit_dz": expected.lambda_dz or 0.0, "logit_bit": expected.lambda_bit or 0.0}
    task = smoothed(expected.label_smoothing) if expected.label_smoothing else cross_entropy
    return Objective(lambdas, grouping, task=task, gradients=lambda found: _clipped(pipeline, found))


def _clipped(pipeline: Pipeline, found: Gradients) -> Gradients:
    """Gradients clipped as promised: each entry to clip_value, all together to a 2-norm of clip_norm."""
    value, norm = pipeline.expected.clip_value, pipeline.expected.clip_norm
    if value is not None:
        found = {name: g.clamp(-value, value) for name, g in found.items()}
    if norm is not None:
        factor = min(1.0, norm / sum(float(g.square().sum()) for g in found.values()) ** 0.5)
        found = {name: factor * g for name, g in found.items()}
    return found


def grouping_of(pipeline: Pipeline) -> Grouping:
    """The groups of removable channels. Raises NotApplicable where the network cannot be followed or has none."""
    try:
        grouping = channel_grouping(pipeline.model, pipeline.expected.input_size or (3, 32, 32))
    except GraphError as error:
        raise NotApplicable(str(error)) from error
    if not grouping.count:
        raise NotApplicable("the network has no removable channel")
    return grouping


def without_hooks(pipeline: Pipeline) -> Pipeline:
    """The pipeline with a copy of its network, whose parameters have no hooks that change their gradients."""
    try:
        return replace(pipeline, model=copy.deepcopy(pipeline.model))
    except Exception:  # a network of one's own that cannot be copied
        return pipeline


def done(seen: StepTrace | None) -> StepTrace:
    """The trace of a step. Raises NotApplicable where the step did not run."""
    if seen is None:
        raise NotApplicable("the step did not run")
    return seen


def gradients_of(seen: StepTrace) -> Gradients:
    """The gradients of a step by name; zeros where a parameter got none."""
    return {n: torch.zeros_like(seen.before[n]) if g is None else g for n, g in seen.gradients.items()}


def other_images(seen: Tensor, given: Tensor) -> bool:
    """Whether the network saw other images than the step was given."""
    return seen.shape != given.shape or not torch.equal(seen.float().cpu(), given.float().cpu())


STRESS = {"logit_dz": 0.6, "logit_bit": 0.4}  # a wide dead zone and few bits: quantized and latent weights differ


@torch.no_grad()
def perturb_(pipeline: Pipeline) -> None:
    """Make every parameter differ from channel to channel and the quantized weights from the latent ones, so that no
    mistake is hidden by equal values. Only inside `preserve_state`."""
    generator = torch.Generator().manual_seed(3)
    for name, p in pipeline.model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in STRESS:
            p.fill_(STRESS[leaf])
        else:
            p.mul_(0.5 + torch.rand(p.shape, generator=generator).to(p))
            if p.dim() == 1:
                p.add_(0.2 * torch.rand(p.shape, generator=generator).to(p))
