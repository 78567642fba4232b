"""A training pipeline as the doctor sees it: parts that can each be replaced, and what is expected of them.

`Pipeline.of_run(run)` is the project's own pipeline. `Pipeline.of_parts(...)` is anybody's: any model, optimizer,
loader and step function. The doctor reaches a pipeline through these fields alone, so
`dataclasses.replace(pipeline, step=...)` examines the same pipeline with another step. A part that is None is absent:
what needs it is "not judged".
Axis letters: N batch.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.doctor.expected import Expected
from experiments.evaluator import EvalResult, Evaluator
from experiments.pipeline import (
    Run,
    RunConfig,
    attach,
    build_network,
    build_optimizer,
    epoch_settings,
)
from experiments.sparsity import coupled_group_lasso
from resnet import NETWORKS
from src import training
from src.data import ImageData, epoch_batches, test_batches
from src.runs import CHECKPOINT, RunFolder, RunProgress
from src.training import EpochRecord, History

Batch = tuple[Tensor, Tensor]
StepFunction = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor, training.Objective, float, torch.dtype], Any]
"""`src.training.train_step`'s signature: (model, optimizer, images, labels, objective, coefficient, precision)."""


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A pipeline. Functions that depend on other parts get the pipeline, so that a replaced part is used everywhere.

    step: one update on one batch; returns the loss: a number, or an object with `total` (and `task`, `logits`,
        `groups`), such as StepLosses.
    train_batches(pipeline, epoch), test_batches(pipeline): normalised images (N, C, H, W) and labels (N,).
    coefficient(epoch), lr_lambda(share of the run done): what the training loop applies; epochs from 0.
    train_epoch(pipeline, epoch) -> Steps: the loop around `step`, which also puts the model into training mode and sets
        the learning rate.
    measure(pipeline, means, epoch, seconds) -> EpochRecord; evaluate(pipeline) -> (EvalResult, accuracy in float32).
    save(pipeline, history, folder) -> path of the checkpoint, called after every epoch.
    baseline(): the full-precision network that the compression is compared with.
    fresh(): a network like `model`, quantizers attached, into which a checkpoint is loaded.
    expected: what the parts should do, from the configuration; where it knows nothing, nothing is compared.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: StepFunction
    train_batches: Callable[[Pipeline, int], Iterable[Batch]]
    expected: Expected = field(default_factory=Expected)
    objective: training.Objective = field(default_factory=training.Objective)
    coefficient: Callable[[int], float] = lambda epoch: 0.0
    lr_lambda: Callable[[float], float] = lambda done: 1.0
    precision: torch.dtype = torch.float32
    data: ImageData | None = None
    test_batches: Callable[[Pipeline], Iterable[Batch]] | None = None
    train_epoch: Callable[[Pipeline, int], Iterator[training.Step]] | None = None
    measure: Callable[[Pipeline, training.EpochMeans, int, float], EpochRecord] | None = None
    evaluate: Callable[[Pipeline], tuple[EvalResult, float]] | None = None
    save: Callable[[Pipeline, History, Path], Path] | None = None
    baseline: Callable[[], nn.Module] | None = None
    fresh: Callable[[], nn.Module] | None = None

    @classmethod
    def of_run(cls, run: Run) -> Pipeline:
        """The project's own pipeline, as `debug_run` and the notebook use it, promising what `run.config` says."""
        config = run.config
        return cls(
            model=run.model,
            optimizer=run.optimizer,
            step=training.train_step,
            train_batches=run_batches,
            expected=Expected.of_config(config, run.model, run.data),
            objective=run.objective,
            coefficient=lambda epoch: config.schedule()(epoch, config.epochs),
            lr_lambda=config.lr_lambda(),
            precision=run.precision,
            data=run.data,
            test_batches=run_test_batches,
            train_epoch=run_epoch,
            measure=run_measure,
            evaluate=run_evaluate,
            save=run_save,
            baseline=lambda: NETWORKS[config.model](run.data.num_classes, config.shortcut),
            fresh=lambda: _fresh(config, run.data),
        )

    @classmethod
    def of_parts(
        cls,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterable[Batch] | Callable[[int], Iterable[Batch]],
        step: Callable[..., Any],
        *,
        tests: Iterable[Batch] | Callable[[], Iterable[Batch]] | None = None,
        expected: Expected | None = None,
        **parts: Any,
    ) -> Pipeline:
        """A pipeline of one's own. batches: an iterable that can be walked more than once, or fn(epoch) -> iterable.

        step: fn(images, labels), or fn(images, labels, coefficient), which makes one update and returns the loss; it
        may hold model and optimizer itself. parts: any other field of Pipeline.
        """
        try:
            takes = len(inspect.signature(step).parameters)
        except (TypeError, ValueError):  # a function that does not say: it gets images and labels
            takes = 2

        def stepping(
            model: nn.Module, optimizer: Any, images: Tensor, labels: Tensor, objective: Any, coefficient: float, _: Any
        ) -> Any:
            return step(images, labels, coefficient) if takes > 2 else step(images, labels)

        def training_batches(pipeline: Pipeline, epoch: int) -> Iterable[Batch]:
            return batches(epoch) if callable(batches) else batches

        def testing_batches(pipeline: Pipeline) -> Iterable[Batch]:
            return tests() if callable(tests) else tests if tests is not None else ()

        return cls(
            model=model,
            optimizer=optimizer,
            step=stepping,
            train_batches=training_batches,
            expected=expected or Expected(),
            test_batches=testing_batches if tests is not None else None,
            **parts,
        )

    def take_step(self, images: Tensor, labels: Tensor, coefficient: float) -> Any:
        """One update of `model` by `step`."""
        return self.step(self.model, self.optimizer, images, labels, self.objective, coefficient, self.precision)

    def first_batches(self, count: int, epoch: int = 0) -> list[Batch]:
        """At most `count` batches of an epoch."""
        found: list[Batch] = []
        for batch in self.train_batches(self, epoch):
            found.append(batch)
            if len(found) >= count:
                break
        return found

    @property
    def device(self) -> torch.device:
        """Where the model is; the CPU for a model without parameters."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))


@dataclass(frozen=True)
class PipelineParts:
    """How the project's pipeline is put together: one function a part, so that one alone can be exchanged.

    What is expected of `build_pipeline`'s result is the configuration's, whatever these functions do.
    """

    network: Callable[[RunConfig, ImageData], nn.Module] = lambda config, data: build_network(
        config, data, data.train_images.device
    )
    attach: Callable[[RunConfig, nn.Module], list[str]] = attach
    optimizer: Callable[[RunConfig, nn.Module], torch.optim.Optimizer] = build_optimizer
    penalty: Callable[[nn.Module], training.Penalty] = coupled_group_lasso


def build_pipeline(config: RunConfig, data: ImageData, parts: PipelineParts | None = None) -> Pipeline:
    """`pipeline.build_run` with any of its parts exchanged. config, data: from `pipeline.prepare_data`."""
    parts = parts or PipelineParts()
    model = parts.network(config, data)
    attached = parts.attach(config, model)
    run = Run(
        config=config,
        data=data,
        device=data.train_images.device,
        precision=training.pick_precision(config.precision, data.train_images.device),
        model=model,
        attached=attached,
        optimizer=parts.optimizer(config, model),
        objective=config.objective(parts.penalty(model) if config.peak > 0 else None),
        history=History(config.epochs),
    )

    def fresh() -> nn.Module:
        again = parts.network(config, data)
        parts.attach(config, again)
        return again

    return replace(Pipeline.of_run(run), baseline=lambda: parts.network(config, data), fresh=fresh)


def run_batches(pipeline: Pipeline, epoch: int) -> Iterable[Batch]:
    """The batches that `src.training.train_epoch` draws."""
    config, data = _run_config(pipeline), _image_data(pipeline)
    generator = torch.Generator().manual_seed(training.epoch_seed(config.seed, epoch))
    return epoch_batches(data, config.batch_size, generator, crop_padding=config.crop_padding, flip=config.flip)


def run_test_batches(pipeline: Pipeline) -> Iterable[Batch]:
    """The whole test set, as `src.evaluation.evaluate` reads it."""
    return test_batches(_image_data(pipeline), 250)


def run_epoch(pipeline: Pipeline, epoch: int) -> Iterator[training.Step]:
    """One epoch of `src.training.train_epoch` with the pipeline's step; with a loader of its own, `loop_epoch`."""
    if pipeline.train_batches is not run_batches:
        yield from loop_epoch(pipeline, epoch)
        return
    settings = epoch_settings(_run_config(pipeline), epoch, pipeline.precision)
    settings |= {"coefficient": pipeline.coefficient(epoch), "lr_lambda": pipeline.lr_lambda}
    yield from training.train_epoch(
        pipeline.model, pipeline.optimizer, _image_data(pipeline), pipeline.objective, step=pipeline.step, **settings
    )


def loop_epoch(pipeline: Pipeline, epoch: int) -> Iterator[training.Step]:
    """The plainest loop around `step`, for any loader: training mode, learning rate, step."""
    pipeline.model.train()
    batches = list(pipeline.train_batches(pipeline, epoch))
    epochs = pipeline.expected.epochs or 1
    for index, (images, labels) in enumerate(batches):
        factor = pipeline.lr_lambda((epoch + index / len(batches)) / epochs)
        for group in pipeline.optimizer.param_groups:
            if group.get("name") == "weights" and "base_lr" in group:
                group["lr"] = group["base_lr"] * factor
        losses = pipeline.take_step(images, labels, pipeline.coefficient(epoch))
        yield training.Step(index, len(batches), len(labels), step_losses(losses))


def step_losses(returned: Any) -> training.StepLosses:
    """What a step returned, as StepLosses: a number or anything with `total` (others then count as 0 or unknown)."""
    if isinstance(returned, training.StepLosses):
        return returned
    total = torch.as_tensor(getattr(returned, "total", returned), dtype=torch.float32).detach()
    if total.numel() != 1:
        raise ValueError(f"the step returned a tensor of shape {tuple(total.shape)}; return the loss, one number")
    zero = torch.zeros_like(total)
    return training.StepLosses(total=total, task=total, logits=zero, groups=zero, correct=zero)


def run_measure(pipeline: Pipeline, means: training.EpochMeans, epoch: int, seconds: float) -> EpochRecord:
    """The record of an epoch, as `pipeline.measure` makes it."""
    return training.measure_epoch(
        pipeline.model,
        pipeline.optimizer,
        _image_data(pipeline),
        means,
        epoch=epoch,
        coefficient=pipeline.coefficient(epoch),
        seconds=seconds,
        precision=pipeline.precision,
    )


def run_evaluate(pipeline: Pipeline) -> tuple[EvalResult, float]:
    """Compression and float32 accuracy, as `pipeline.evaluate_run` computes them."""
    if pipeline.baseline is None:
        raise ValueError("compression needs `baseline`, a function that builds the full-precision network")
    result = Evaluator(pipeline.baseline()).evaluate(pipeline.model)
    return result, training.evaluate(pipeline.model, _image_data(pipeline))[1]


def run_save(pipeline: Pipeline, history: History, folder: Path) -> Path:
    """The checkpoint that `debug_run` writes after an epoch; returns its path."""
    config, data = _run_config(pipeline), _image_data(pipeline)
    progress = RunProgress(history)
    RunFolder(folder).save_progress(pipeline.model, pipeline.optimizer, progress, asdict(config), data.digest)
    return folder / CHECKPOINT


def train(
    pipeline: Pipeline, folder: Path | None = None, on_step: Callable[[int, training.Step], None] | None = None
) -> Iterator[tuple[EpochRecord, Path | None]]:
    """Train the expected epochs in the pipeline's order (steps, measure, append, save); yields record and checkpoint.

    Raises ValueError where the pipeline has no `measure`: there is then nothing to record.
    """
    if pipeline.measure is None:
        raise ValueError("this pipeline has no `measure`: give one that returns an EpochRecord, or examine its parts")
    history = History(pipeline.expected.epochs or 1)
    for epoch in range(history.epochs):
        means, started = training.EpochMeans(), time.perf_counter()
        for step in (pipeline.train_epoch or loop_epoch)(pipeline, epoch):
            means.add(step)
            if on_step:
                on_step(epoch, step)
        record = pipeline.measure(pipeline, means, epoch, time.perf_counter() - started)
        history.records.append(record)  # not `append`, which refuses what the doctor wants to report
        path = pipeline.save(pipeline, history, folder) if pipeline.save and folder else None
        yield record, path


def _fresh(config: RunConfig, data: ImageData) -> nn.Module:
    network = build_network(config, data, data.train_images.device)
    attach(config, network)
    return network


def _run_config(pipeline: Pipeline) -> RunConfig:
    if pipeline.expected.config is None:
        raise ValueError("this part belongs to the project's own pipeline and needs expected.config; give your own")
    return pipeline.expected.config


def _image_data(pipeline: Pipeline) -> ImageData:
    if pipeline.data is None:
        raise ValueError("this part belongs to the project's own pipeline and needs `data`; give your own")
    return pipeline.data
