"""A training pipeline as the doctor sees it: parts that can each be replaced, and what is expected of them.

`Pipeline.of_run(run)` is the project's own pipeline. `Pipeline.of_parts(...)` is anybody's: any model, optimizer,
loader and step function. The doctor reaches a pipeline through these fields alone, so
`dataclasses.replace(pipeline, step=...)` examines the same pipeline with another step. A part that is None is absent:
what needs it is "not judged".
Axis letters: N batch.
"""

from __future__ import annotations

import gc
import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

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
COEFFICIENT = ("coefficient", "lambda_", "lam", "penalty", "penalty_weight", "strength")
"""Names of a step's parameter that gets the penalty's coefficient; any other keeps its default."""


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A pipeline. Functions that depend on other parts get the pipeline, so that a replaced part is used everywhere.

    step: one update on one batch; returns the loss: a number, or an object or a dict with `total` or `loss` (and
        `task`, `logits`, `groups`, `correct`), such as StepLosses.
    train_batches(pipeline, epoch), test_batches(pipeline): normalised images (N, C, H, W) and labels (N,).
    coefficient(epoch), lr_lambda(share of the run done): what the training loop applies; epochs from 0.
    train_epoch(pipeline, epoch) -> Steps: the loop around `step`, which also puts the model into training mode and sets
        the learning rate.
    measure(pipeline, means, epoch, seconds) -> EpochRecord; evaluate(pipeline) -> (EvalResult, accuracy in float32).
    save(pipeline, history, folder) -> path of the checkpoint, called after every epoch.
    baseline(): the full-precision network that the compression is compared with.
    fresh(): a network like `model`, quantizers attached, into which a checkpoint is loaded.
    schedulers: that a step moves on; they are put back with the optimizer.
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
    schedulers: tuple[LRScheduler, ...] = ()

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
        data: Any = None,
        epochs: int | None = None,
        measure: Callable[..., Any] | None = None,
        expected: Expected | None = None,
        **parts: Any,
    ) -> Pipeline:
        """A pipeline of one's own. batches: an iterable that can be walked more than once, or fn(epoch) -> iterable.

        step: fn(images, labels), which makes one update and returns the loss; it may hold model and optimizer itself.
        A parameter called `coefficient` (COEFFICIENT has its other names) gets the penalty's. data: the raw images
        behind the loaders, (images, labels) or ((images, labels), (test images, test labels)), tensors or arrays
        (N, C, H, W), (N, H, W, C) or (N, H, W). epochs: to train; without it the examination ends with the first steps.
        measure: fn() -> accuracy from 0 to 1, called after every epoch, or fn(pipeline, means, epoch, seconds) ->
        accuracy or EpochRecord. parts: any other field of Pipeline. torch's learning-rate schedulers are found by
        their optimizer.
        """
        expected = expected or Expected()
        expected = expected if epochs is None else replace(expected, epochs=epochs)
        asked = [name for name in _parameters(step) if name in COEFFICIENT]

        def stepping(
            model: nn.Module, optimizer: Any, images: Tensor, labels: Tensor, objective: Any, coefficient: float, _: Any
        ) -> Any:
            return step(images, labels, **dict.fromkeys(asked[:1], coefficient))

        def training_batches(pipeline: Pipeline, epoch: int) -> Iterable[Batch]:
            return batches(epoch) if callable(batches) else batches

        def testing_batches(pipeline: Pipeline) -> Iterable[Batch]:
            return tests() if callable(tests) else tests if tests is not None else ()

        return cls(
            model=model,
            optimizer=optimizer,
            step=stepping,
            train_batches=training_batches,
            expected=expected,
            test_batches=testing_batches if tests is not None else None,
            data=None if data is None else raw_images(data, expected.num_classes),
            measure=None if measure is None else _measuring(measure),
            schedulers=_schedulers_of(optimizer),
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
    given: Any = pipeline.train_batches(pipeline, epoch)
    batches = given if hasattr(given, "__len__") else list(given)
    epochs = pipeline.expected.epochs or 1
    for index, (images, labels) in enumerate(batches):
        factor = pipeline.lr_lambda((epoch + index / len(batches)) / epochs)
        for group in pipeline.optimizer.param_groups:
            if group.get("name") == "weights" and "base_lr" in group:
                group["lr"] = group["base_lr"] * factor
        losses = pipeline.take_step(images, labels, pipeline.coefficient(epoch))
        yield training.Step(index, len(batches), len(labels), step_losses(losses))


def step_losses(returned: Any) -> training.StepLosses:
    """What a step returned, as StepLosses. Parts that it does not tell count as 0, the task's as all of the loss.

    Raises ValueError where it holds no loss.
    """
    if isinstance(returned, training.StepLosses):
        return returned
    held = returned if isinstance(returned, Mapping) else getattr(returned, "__dict__", {})
    total = next((held[name] for name in ("total", "loss") if name in held), returned)
    if not isinstance(total, Tensor | float | int | np.generic):
        what = "None" if total is None else type(total).__name__
        raise ValueError(f"the step returned {what}; return the loss, one number")
    total = torch.as_tensor(total, dtype=torch.float32).detach()
    if total.numel() != 1:
        raise ValueError(f"the step returned a tensor of shape {tuple(total.shape)}; return the loss, one number")
    total = total.reshape(())
    parts = {"task": total, **dict.fromkeys(("logits", "groups", "correct"), torch.zeros_like(total))}
    told = {name: torch.as_tensor(held.get(name, part)).detach().to(total) for name, part in parts.items()}
    return training.StepLosses(total=total, **told)


def raw_images(data: Any, classes: int | None = None) -> ImageData:
    """The `data` of `Pipeline.of_parts` as ImageData: images (N, C, H, W) of any size; an absent test set is empty."""
    if isinstance(data, ImageData):
        return data
    parts = (data, None) if hasattr(data[0], "shape") else data
    images, labels = _raw_part(*parts[0])
    tests = (images[:0], labels[:0]) if parts[1] is None else _raw_part(*parts[1])
    count = classes or int(labels.max()) + 1
    return ImageData("own", "own", images, labels, *tests, tuple(map(str, range(count))), (0, 0, 0), (1, 1, 1))


def _raw_part(images: Any, labels: Any) -> Batch:
    images, labels = torch.as_tensor(images), torch.as_tensor(labels).long()
    if images.dim() == 3:
        images = images[:, None]
    if images.dim() != 4 or len(images) != len(labels):
        shapes = f"{tuple(images.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(f"data: images {shapes}; need (N, C, H, W), (N, H, W, C) or (N, H, W), and N labels")
    last = images.shape[1] > 4 and images.shape[3] <= 4
    return images.permute(0, 3, 1, 2) if last else images, labels


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
    """Train the expected epochs in their order (steps, measure, append, save); yields record and checkpoint."""
    history = History(pipeline.expected.epochs or 1)
    for epoch in range(history.epochs):
        means, started = training.EpochMeans(), time.perf_counter()
        for step in (pipeline.train_epoch or loop_epoch)(pipeline, epoch):
            means.add(step)
            if on_step:
                on_step(epoch, step)
        record = (pipeline.measure or plain_record)(pipeline, means, epoch, time.perf_counter() - started)
        history.records.append(record)  # not `append`, which refuses what the doctor wants to report
        path = pipeline.save(pipeline, history, folder) if pipeline.save and folder else None
        yield record, path


def plain_record(
    pipeline: Pipeline, means: training.EpochMeans, epoch: int, seconds: float, accuracy: float = math.nan
) -> EpochRecord:
    """The record of an epoch of which the steps' losses are known, and the accuracy at most; the rest is NaN."""
    groups = getattr(pipeline.optimizer, "param_groups", None) or [{}]
    return EpochRecord(
        epoch=epoch + 1,
        **means.read(),
        test_loss=math.nan,
        unstructured_sparsity=math.nan,
        structured_sparsity=math.nan,
        mean_bits=math.nan,
        coefficient=pipeline.coefficient(epoch),
        learning_rate=float(groups[0].get("lr", math.nan)),
        accuracy=accuracy,
        seconds=seconds,
        layers=(),
    )


def is_plain(record: EpochRecord) -> bool:
    """Whether a record is a `plain_record`, of which only losses and at most the accuracy can be compared."""
    return record.layers == () and math.isnan(record.test_loss)


def _measuring(measure: Callable[..., Any]) -> Callable[[Pipeline, training.EpochMeans, int, float], EpochRecord]:
    """The `measure` of `Pipeline.of_parts` as that of a Pipeline."""

    def record(pipeline: Pipeline, means: training.EpochMeans, epoch: int, seconds: float) -> EpochRecord:
        found = measure(pipeline, means, epoch, seconds) if _parameters(measure) else measure()
        if not isinstance(found, float | int | np.floating | Tensor):
            return found
        if not 0 <= float(found) <= 1:
            raise ValueError(f"`measure` returned {float(found):g}; return the share of right answers, from 0 to 1")
        return plain_record(pipeline, means, epoch, seconds, float(found))

    return record


def _parameters(function: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters; none where it does not say."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def _schedulers_of(optimizer: Any) -> tuple[LRScheduler, ...]:
    """An optimizer does not know its schedulers; they know it."""
    known = (o for o in gc.get_objects() if issubclass(type(o), LRScheduler))  # isinstance asks proxies, too
    return tuple(scheduler for scheduler in known if scheduler.optimizer is optimizer)


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
