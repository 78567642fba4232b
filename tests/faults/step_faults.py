"""Faults in the network, in the training step and in the loop around it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.doctor import Pipeline
from experiments.doctor import pipeline as parts_of
from experiments.doctor.causes.step_mutants import changed, labels_as, piece, task_as
from experiments.doctor.pipeline import PipelineParts
from experiments.doctor.reference.objective import cross_entropy, smoothed
from experiments.notebook import demonstration
from experiments.notebook.demonstration import WIDTHS, Fault
from experiments.pipeline import RunConfig
from resnet import BasicBlock, ResNet
from src import training
from src.data import ImageData
from tests.faults.mutated import step_fault, update_fault
from utils_quantization import latent_weight, quantized_layers

Step = Callable[..., training.StepLosses]


def stepping(make: Callable[[Step], Step]) -> Callable[[Pipeline], Pipeline]:
    """The pipeline with `make(its step)` for a step."""
    return lambda pipeline: replace(pipeline, step=make(pipeline.step))


def after_each(change: Callable[[nn.Module, torch.optim.Optimizer], Any]) -> Callable[[Pipeline], Pipeline]:
    def make(of: Step) -> Step:
        def step(model: nn.Module, optimizer: torch.optim.Optimizer, *rest: Any) -> training.StepLosses:
            losses = of(model, optimizer, *rest)
            with torch.no_grad():
                change(model, optimizer)
            return losses

        return step

    return stepping(make)


def with_batch(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Pipeline], Pipeline]:
    def make(of: Step) -> Step:
        return lambda model, optimizer, images, labels, *rest: of(model, optimizer, *change(images, labels), *rest)

    return stepping(make)


def keep_quantized(model: nn.Module, _: Any) -> None:
    """The latent weights are overwritten by their quantized values."""
    for layer in quantized_layers(model).values():
        latent_weight(layer).copy_(layer.weight)


def undo_one_layer(pipeline: Pipeline) -> Pipeline:
    """The stem's weight is put back to its start after every step."""
    start = pipeline.model.get_parameter("conv1.weight").detach().clone()
    return after_each(lambda model, _: model.get_parameter("conv1.weight").copy_(start))(pipeline)


def starts_again_every_epoch(pipeline: Pipeline) -> Pipeline:
    """Every epoch begins with the weights of the first."""
    start = copy.deepcopy(pipeline.model.state_dict())

    def train_epoch(s: Pipeline, epoch: int) -> Iterator[training.Step]:
        s.model.load_state_dict(start)
        yield from parts_of.run_epoch(s, epoch)

    return replace(pipeline, train_epoch=train_epoch)


def stays_in_eval(pipeline: Pipeline) -> Pipeline:
    """Nobody calls model.train() after the first measurement."""

    def train_epoch(s: Pipeline, epoch: int) -> Iterator[training.Step]:
        if epoch == 0:
            s.model.train()
        batches = list(s.train_batches(s, epoch))
        for index, (images, labels) in enumerate(batches):
            losses = s.take_step(images, labels, s.coefficient(epoch))
            yield training.Step(index, len(batches), len(labels), losses)

    def measure(s: Pipeline, *rest: Any) -> Any:
        record = parts_of.run_measure(s, *rest)
        s.model.eval()
        return record

    return replace(pipeline, train_epoch=train_epoch, measure=measure)


def network(change: Callable[[nn.Module], Any]) -> Callable[[PipelineParts], PipelineParts]:
    """The pipeline's network, changed before anything is attached."""

    def apply(parts: PipelineParts) -> PipelineParts:
        def make(config: RunConfig, data: ImageData) -> nn.Module:
            built = parts.network(config, data)
            with torch.no_grad():
                return change(built) or built

        return replace(parts, network=make)

    return apply


def another(kind: type[ResNet], **settings: Any) -> Callable[[PipelineParts], PipelineParts]:
    def make(config: RunConfig, data: ImageData) -> nn.Module:
        torch.manual_seed(config.seed)
        return kind(BasicBlock, [1, 1, 1], **{"num_classes": data.num_classes, "widths": WIDTHS, **settings})

    return lambda parts: replace(parts, network=make)


class EndsWithSoftmax(ResNet):
    """Returns probabilities, of which the cross entropy takes the softmax again."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class DropoutAlwaysOn(ResNet):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.dropout(self.layer3(self.layer2(self.layer1(out))), 0.3, training=True)
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


class SkipsAStage(ResNet):
    """The second stage's block is computed and its result thrown away but for the shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer1(F.relu(self.bn1(self.conv1(x))))
        out = self.layer3(F.relu(self.layer2[0].shortcut(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def momentum(value: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = value

    return change


def frozen(prefix: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(prefix))

    return change


def large_classifier(model: nn.Module) -> None:
    model.get_parameter("linear.weight").mul_(20)


def all_zero(model: nn.Module) -> None:
    for p in model.parameters():
        if p.dim() > 1:
            p.zero_()


FAULTS = (
    demonstration.FAULTS["BatchNorm in eval mode"],
    Fault(
        "never back in training mode",
        "The first measurement leaves the network in eval mode, and nobody puts it back.",
        ("batchnorm-in-eval",),
        pipeline=stays_in_eval,
    ),
    Fault(
        "BatchNorm momentum 0",
        "The running statistics stay at 0 and 1, with which the network is evaluated.",
        ("batchnorm-in-eval", "batchnorm-momentum"),
        parts=network(momentum(0.0)),
    ),
    Fault(
        "a stage frozen",
        "The last stage does not require gradients.",
        ("parameter-frozen",),
        parts=network(frozen("layer3")),
    ),
    Fault(
        "a stage skipped",
        "The second stage's convolutions are left out of the forward pass.",
        ("gradient-missing", "layer-unused"),
        parts=another(SkipsAStage),
    ),
    Fault(
        "softmax twice",
        "The network returns probabilities, and the loss takes their softmax again.",
        ("loss-wrong", "softmax-twice"),
        parts=another(EndsWithSoftmax),
    ),
    Fault(
        "dropout never off",
        "Dropout acts in evaluation as well.",
        ("evaluation-not-repeatable",),
        parts=another(DropoutAlwaysOn),
    ),
    Fault(
        "too many outputs",
        "The network has 100 outputs for 10 classes.",
        ("classes-mismatch",),
        parts=another(ResNet, num_classes=100),
    ),
    Fault(
        "classifier starts too large",
        "The classifier's first weights are 20 times too large.",
        ("head-badly-scaled",),
        parts=network(large_classifier),
    ),
    Fault(
        "all weights start at zero",
        "The classifier and every convolution start at 0, and nothing tells channels apart.",
        ("initial-weights", "gradient-missing"),
        parts=network(all_zero),
    ),
    step_fault(
        "loss divided by the batch",
        "The mean loss is divided by the batch size again, so the penalty weighs 48 times as much.",
        task_as(lambda scores, labels: cross_entropy(scores, labels) / len(labels)),
    ),
    step_fault(
        "summed loss",
        "The loss is the sum over the batch, beside which the penalty weighs nothing.",
        task_as(lambda scores, labels: len(labels) * cross_entropy(scores, labels)),
    ),
    step_fault(
        "loss on half of the batch",
        "The loss leaves out the second half of every batch.",
        task_as(lambda scores, labels: cross_entropy(scores[: len(scores) // 2], labels[: len(labels) // 2])),
    ),
    step_fault(
        "heavy label smoothing", "The loss smooths labels by 0.5, which nobody asked for.", task_as(smoothed(0.5))
    ),
    step_fault(
        "scores at half their size",
        "The scores are divided by a temperature of 2 before the loss.",
        piece("loss-wrong", transform=lambda scores: scores / 2),
    ),
    step_fault(
        "binary losses",
        "Every class has a binary loss of its own, as if an image could belong to several.",
        task_as(lambda s, y: F.binary_cross_entropy_with_logits(s, F.one_hot(y, s.shape[1]).to(s))),
    ),
    step_fault(
        "softmax in the step",
        "The step takes the softmax of the scores, of which the cross entropy takes it again.",
        piece("softmax-twice", transform=lambda scores: scores.softmax(1)),
        "loss-wrong",
    ),
    step_fault(
        "quantizers off in the step",
        "The step trains the network with its quantizers switched off.",
        piece("quantizers-off-in-training", quantized=False),
        "quantizers-off",
    ),
    step_fault(
        "labels mixed in the step", "The step permutes the labels of its batch.", labels_as(lambda y: y.roll(1))
    ),
    step_fault(
        "labels in an order of their own",
        "The step shuffles labels and leaves the images as they are.",
        labels_as(lambda y: y[torch.randperm(len(y), generator=torch.Generator().manual_seed(5))]),
    ),
    step_fault(
        "labels counted from 1",
        "The step adds 1 to every label, and the last class becomes the first.",
        labels_as(lambda y: (y + 1) % 10),
    ),
    step_fault(
        "gradients clipped by value",
        "Every entry of a gradient is clipped to 1e-3.",
        piece("gradients-scaled", gradients=lambda g: {n: v.clamp(-1e-3, 1e-3) for n, v in g.items()}),
    ),
    step_fault(
        "gradients divided by the batch",
        "The gradients are divided by 24 before the update, and the loss is not.",
        piece("gradients-scaled", gradients=lambda g: {n: v / 24 for n, v in g.items()}),
    ),
    Fault(
        "images blackened in the step",
        "The step erases the lower half of its images.",
        ("step-images-wrong",),
        pipeline=with_batch(lambda images, labels: (images * (torch.arange(32) < 16)[:, None], labels)),
    ),
    Fault(
        "quantized weights written back",
        "After every step the latent weights are overwritten by their quantized values.",
        ("changes-too-much", "update-wrong"),
        pipeline=after_each(keep_quantized),
    ),
    Fault(
        "one layer put back",
        "The stem's weight is put back to its start after every step.",
        ("no-update", "changes-too-much", "update-wrong"),
        pipeline=undo_one_layer,
    ),
    Fault(
        "every epoch from the start",
        "The first weights are loaded again at the beginning of every epoch.",
        ("weights-reset", "stuck-at-chance"),
        pipeline=starts_again_every_epoch,
    ),
    update_fault(
        "weights decayed by hand",
        "The step shrinks all weights by a hundredth besides what the optimizer does.",
        changed("update-wrong", lambda p, movement: movement - 0.01 * (p + movement)),
        "changes-too-much",
    ),
    update_fault(
        "averaged weights written back",
        "After every step the weights are overwritten by their running average, of which the step is a tenth.",
        changed("weights-averaged", lambda p, movement: 0.1 * movement),
        "learning-rate-too-small",
    ),
    update_fault(
        "a thousandth of an update",
        "The step moves every parameter by a thousandth of what the optimizer says.",
        changed("learning-rate-too-small", lambda p, movement: 1e-3 * movement),
        "weights-averaged",
    ),
    update_fault(
        "half precision written back",
        "After every step the parameters are rounded to bfloat16.",
        changed("update-wrong", lambda p, movement: (p + movement).bfloat16().float() - p),
        "changes-too-much",
    ),
    step_fault(
        "reported loss without penalties",
        "The step reports the task loss as the total.",
        piece("loss-misreported", report=lambda losses: losses._replace(total=losses.task)),
    ),
    step_fault(
        "no backward pass",
        "The step computes the loss, and updates with gradients of 0.",
        piece("gradient-missing", gradients=lambda found: {name: 0 * g for name, g in found.items()}),
        "no-update",
    ),
)
