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
from experiments.doctor.pipeline import PipelineParts
from experiments.notebook import demonstration
from experiments.notebook.demonstration import WIDTHS, Fault
from experiments.pipeline import RunConfig
from resnet import BasicBlock, ResNet
from src import training
from src.data import ImageData
from utils_quantization import latent_weight, quantized_layers, shared_quantized_weights

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


def task_loss(compute: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Pipeline], Pipeline]:
    """The pipeline's step, written out with another task loss."""

    def step(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        objective: training.Objective,
        coefficient: float,
        precision: torch.dtype,
    ) -> training.StepLosses:
        with shared_quantized_weights(model):
            scores = model(images).float()
            task = compute(scores, labels)
            logits = training.squared_logits(model, objective.lambda_dz, objective.lambda_bit)
            groups = objective.penalty(model) if objective.penalty and coefficient else task.new_zeros(())
            total = task + logits + coefficient * groups
            optimizer.zero_grad()
            total.backward()
        optimizer.step()
        correct = (scores.argmax(1) == labels).sum()
        return training.StepLosses(*(part.detach() for part in (total, task, logits, groups, correct)))

    return lambda pipeline: replace(pipeline, step=step)


def reported(change: Callable[[training.StepLosses], training.StepLosses]) -> Callable[[Pipeline], Pipeline]:
    return stepping(lambda of: lambda *rest: change(of(*rest)))


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


def loss_alone(
    model: nn.Module, images: Tensor, labels: Tensor, objective: training.Objective, coefficient: float, *_: Any
) -> training.StepLosses:
    """The losses of a step without its update."""
    scores = model(images).float().detach()
    task, logits = (
        F.cross_entropy(scores, labels),
        training.squared_logits(model, objective.lambda_dz, objective.lambda_bit),
    )
    groups = objective.penalty(model) if objective.penalty and coefficient else task.new_zeros(())
    correct = (scores.argmax(1) == labels).sum()
    return training.StepLosses(
        *(x.detach() for x in (task + logits + coefficient * groups, task, logits, groups, correct))
    )


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
    Fault(
        "loss divided by the batch",
        "The mean loss is divided by the batch size again, so the penalty weighs 48 times as much.",
        ("loss-wrong",),
        pipeline=task_loss(lambda scores, labels: F.cross_entropy(scores, labels) / len(labels)),
    ),
    Fault(
        "summed loss",
        "The loss is the sum over the batch, beside which the penalty weighs nothing.",
        ("loss-wrong",),
        pipeline=task_loss(lambda scores, labels: F.cross_entropy(scores, labels, reduction="sum")),
    ),
    Fault(
        "loss on half of the batch",
        "The loss leaves out the second half of every batch.",
        ("loss-wrong", "step-images-wrong", "step-gradient-wrong"),
        pipeline=task_loss(
            lambda scores, labels: F.cross_entropy(scores[: len(scores) // 2], labels[: len(labels) // 2])
        ),
    ),
    Fault(
        "heavy label smoothing",
        "The loss smooths labels by 0.5, which nobody asked for.",
        ("loss-wrong",),
        pipeline=task_loss(lambda scores, labels: F.cross_entropy(scores, labels, label_smoothing=0.5)),
    ),
    Fault(
        "labels mixed in the step",
        "The step permutes the labels of its batch.",
        ("step-labels-wrong",),
        pipeline=with_batch(lambda images, labels: (images, labels.roll(1))),
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
    Fault(
        "weights decayed by hand",
        "The step shrinks all weights by a hundredth besides what the optimizer does.",
        ("update-wrong", "changes-too-much"),
        pipeline=after_each(lambda model, _: [p.mul_(0.99) for p in model.parameters() if p.dim() > 1]),
    ),
    Fault(
        "reported loss without penalties",
        "The step reports the task loss as the total.",
        ("loss-misreported",),
        pipeline=reported(lambda losses: replace(losses, total=losses.task)),
    ),
    Fault(
        "no backward pass",
        "The step computes the loss, and updates with the gradients that it never made.",
        ("no-update", "gradient-missing"),
        pipeline=stepping(lambda of: lambda model, optimizer, *rest: loss_alone(model, *rest)),
    ),
)
