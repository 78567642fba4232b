"""Faults to try the doctor on: what a fault is, the small pipeline that it is put into, and a few for a reader.

    report = diagnose("half of the layers")

A fault breaks one thing of the pipeline through the seams that anybody may use: another part when it is built
(`PipelineParts`), other data, or another function afterwards (`dataclasses.replace(pipeline, step=...)`). The
configuration stays what it was, and so does what is expected. A diagnosis takes seconds: the doctor stops after the
stage that finds something, and a run lasts a few epochs. tests/faults/ has many more faults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from experiments.doctor import Pipeline, PipelineParts, Report, build_pipeline, examine, run_measure
from experiments.evaluator import Evaluator
from experiments.pipeline import RunConfig, configure, prepare_data
from experiments.sparsity import coupled_group_lasso
from resnet import BasicBlock, ResNet
from src import training
from src.data import ImageData
from src.quantizer import DeadZoneLDZCompander, dequantize
from src.training import EpochRecord, LayerRecord, summarize_layers
from utils_quantization import attach_weight_quantizers, latent_weight, quantization, quantized_layers

HEALTHY = "nothing"
EPOCHS = 4
WIDTHS = (8, 16, 32)
DIGITS: Mapping[str, Any] = {
    "limit": 480,
    "batch_size": 24,
    "learning_rate": 0.01,
    "dz_learning_rate": 0.02,
    "bit_learning_rate": 0.02,
    "delay": 1,
    "ramp": 2,
    "flip": False,
}
CIFAR10: Mapping[str, Any] = {
    **DIGITS,
    "limit": 960,
    "batch_size": 32,
    "learning_rate": 5e-3,
    "dz_learning_rate": 0.01,
    "bit_learning_rate": 0.01,
    "flip": True,
}


@dataclass(frozen=True)
class Fault:
    """One thing broken.

    name: stable, for tables and menus. breaks: one sentence. causes: keys of experiments/doctor/causes, any of
    which names this fault rightly. parts, data, pipeline: what is exchanged; each returns what it was given where
    nothing is. settings: of the configuration in which the fault can show at all (decay needs the decoupled form).
    edits: of the product's own source, what takes the place of a function, by its dotted name ("src.module.function");
    in force inside `edited(fault)` alone.
    """

    name: str
    breaks: str
    causes: tuple[str, ...]
    parts: Callable[[PipelineParts], PipelineParts] = lambda parts: parts
    data: Callable[[ImageData], ImageData] = lambda data: data
    pipeline: Callable[[Pipeline], Pipeline] = lambda pipeline: pipeline
    settings: Mapping[str, Any] = field(default_factory=dict)
    edits: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def edited(fault: Fault) -> Iterator[None]:
    """Inside, the product's source is as the fault edits it: for the doctor, too, who imports it."""
    with ExitStack() as stack:
        for name, value in fault.edits.items():
            stack.enter_context(mock.patch(name, value))
        yield


def small_config(data: str = "digits", seed: int = 0, **settings: Any) -> RunConfig:
    """A run of a few seconds in which everything happens that the doctor looks at.

    Digits: 480 training images in 20 steps an epoch, 8 epochs; at the end nine of ten test images are right, half of
    the weights are zero, some filters dead and 5 bits left of 8. CIFAR-10: 960 images in 30 steps, flipped.
    """
    given: dict[str, Any] = {"data": data, "seed": seed, "device": "cpu", "precision": "fp32", "epochs": 8}
    own = {"digits": DIGITS, "cifar10": CIFAR10}[data]
    return configure("smoke", **{**given, **own, **settings})


@lru_cache(maxsize=4)
def small_data(data: str = "digits", limit: int | None = 480) -> ImageData:
    """The images of `small_config`, loaded once."""
    return prepare_data(small_config(data, limit=limit))[1]


def small_network(config: RunConfig, data: ImageData) -> ResNet:
    """One block a stage at half the width, from `config.seed`: 19,738 parameters."""
    torch.manual_seed(config.seed)
    network = ResNet(BasicBlock, [1, 1, 1], data.num_classes, widths=WIDTHS)
    return network.to(memory_format=torch.channels_last)


def small_parts() -> PipelineParts:
    """The project's own parts around the small network."""
    return PipelineParts(network=small_network)


def healthy(config: RunConfig | None = None) -> Pipeline:
    """The small pipeline with nothing broken."""
    config = config or small_config()
    return build(config, small_data(config.data, config.limit), small_parts())


def broken(fault: Fault, config: RunConfig | None = None) -> Pipeline:
    """The small pipeline with `fault` in it."""
    config = replace(config or small_config(), **fault.settings)
    data = fault.data(small_data(config.data, config.limit))
    return fault.pipeline(build(config, data, fault.parts(small_parts())))


def build(config: RunConfig, data: ImageData, parts: PipelineParts) -> Pipeline:
    """`build_pipeline`, compared with the dense network that the faultless parts would make."""
    pipeline = build_pipeline(config, data, parts)
    baseline = small_network(config, data)
    return replace(
        pipeline,
        evaluate=lambda s: evaluated(s, Evaluator(baseline)),
        baseline=lambda: small_network(config, data),
    )


def evaluated(pipeline: Pipeline, evaluator: Evaluator) -> Any:
    """Compression by `evaluator`, and the float32 accuracy."""
    assert pipeline.data is not None
    return evaluator.evaluate(pipeline.model), training.evaluate(pipeline.model, pipeline.data)[1]


def diagnose(name: str, on_stage: Callable[[str, Report], Any] | None = None) -> Report:
    """What the doctor says of the small pipeline with the fault called `name`, up to the first stage that finds one.

    name: a key of BREAKS. Raises KeyError for another. on_stage: called with each stage and its findings.
    """
    config = small_config(epochs=EPOCHS)
    pipeline = healthy(config) if name == HEALTHY else broken(FAULTS[name], config)
    return examine(pipeline, stop_when_faulty=True, on_stage=on_stage)


def attaching(
    quantizer: Callable[..., nn.Module] = DeadZoneLDZCompander, exclude: tuple[str, ...] | None = None
) -> Callable[[PipelineParts], PipelineParts]:
    """Attach another quantizer than the configuration's, or with another list of exclusions."""

    def attach(config: RunConfig, model: nn.Module) -> list[str]:
        excluded = config.exclude_layers if exclude is None else exclude
        return attach_weight_quantizers(model, excluded, quantizer, config.quantizer_kwargs)

    return lambda parts: replace(parts, attach=attach)


class RoundStops(DeadZoneLDZCompander):
    """The index is rounded without the straight-through estimator, so it has no gradient."""

    def forward(self, w: Tensor) -> Tensor:
        """w: any shape; returns the same shape and the right values."""
        range_ = self.grid(w).range
        dead_zone = 2 * range_ * self.dead_zone_share()
        step = (range_ - dead_zone / 2) / (torch.exp2(self.get_bitwidth() - 1) - 1.5) + 1e-8
        return dequantize(self.indices(w), step, dead_zone / 2 - step / 2)

    @staticmethod
    def quantize_many(quantizers: Any, weights: Any) -> list[Tensor]:
        """One layer at a time."""
        return [quantizer(w) for quantizer, w in zip(quantizers, weights, strict=True)]


def _logits_missing(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    groups = training.parameter_groups(model, **config.group_kwargs)
    return training.make_optimizer([group for group in groups if group["name"] == "weights"])


def _penalty_on_latent(model: nn.Module) -> training.Penalty:
    penalty = coupled_group_lasso(model)

    def on_latent(network: nn.Module) -> Tensor:
        with quantization(network, enabled=False):
            return penalty(network)

    return on_latent


def _batchnorm_in_eval(pipeline: Pipeline) -> Pipeline:
    def step(model: nn.Module, *rest: Any) -> Any:
        model.eval()
        return pipeline.step(model, *rest)

    return replace(pipeline, step=step)


def recording(change: Callable[[Pipeline, EpochRecord], EpochRecord]) -> Callable[[Pipeline], Pipeline]:
    """The pipeline with every record changed by fn(pipeline, record)."""

    def measure(s: Pipeline, *rest: Any) -> EpochRecord:
        return change(s, run_measure(s, *rest))

    return lambda pipeline: replace(pipeline, measure=measure)


def layers(change: Callable[[nn.Module, LayerRecord], LayerRecord]) -> Callable[[Pipeline], Pipeline]:
    """Records whose layers are changed one by one, and summed up again."""

    def apply(s: Pipeline, record: EpochRecord) -> EpochRecord:
        found = quantized_layers(s.model)
        changed = tuple(change(found[layer.name], layer) for layer in record.layers)
        sizes = {name: latent_weight(layer).numel() for name, layer in found.items()}
        return replace(record, layers=changed, **summarize_layers(changed, sizes))

    return recording(apply)


def accuracy(of: Callable[[Pipeline], float]) -> Callable[[Pipeline], Pipeline]:
    """Records and the last evaluation report `of(pipeline)` as the test accuracy."""

    def apply(pipeline: Pipeline) -> Pipeline:
        return replace(
            recording(lambda s, record: replace(record, accuracy=of(s)))(pipeline),
            evaluate=lambda s: (pipeline.evaluate(s)[0], of(s)),  # type: ignore[misc]
        )

    return apply


def _zeros_of_latent(layer: nn.Module, record: LayerRecord) -> LayerRecord:
    zero = latent_weight(layer).flatten(1) == 0
    return replace(record, sparsity=float(zero.float().mean()), dead=tuple(zero.all(1).tolist()))


def _half_of_the_test_set(s: Pipeline) -> float:
    assert s.data is not None
    half = len(s.data.test_labels) // 2
    data = replace(s.data, test_images=s.data.test_images[:half], test_labels=s.data.test_labels[:half])
    return training.evaluate(s.model, data, precision=s.precision)[1]


def _tests_among_training(data: ImageData) -> ImageData:
    images, labels = (data.train_images, data.test_images), (data.train_labels, data.test_labels)
    return replace(data, train_images=torch.cat(images), train_labels=torch.cat(labels))


_CATALOGUE = (
    Fault(
        "half of the layers",
        "The exclusion of conv1 is matched anywhere in a name, so every block's first convolution stays in float.",
        ("quantizers-missing",),
        parts=attaching(exclude=("conv1", "*.conv1", "bn", "linear")),
    ),
    Fault(
        "logits missing",
        "The optimizer holds the weights alone, so dead zones and bits never move.",
        ("logits-not-in-optimizer",),
        parts=lambda parts: replace(parts, optimizer=_logits_missing),
    ),
    Fault(
        "round stops the gradient",
        "Rounding is not straight-through, so no weight gets a gradient through its quantizer.",
        ("no-ste-round",),
        parts=attaching(RoundStops),
    ),
    Fault(
        "test images in the training set",
        "The test images are among the training images.",
        ("test-in-training",),
        data=_tests_among_training,
    ),
    Fault(
        "penalty on latent weights",
        "The penalty reads the float weights behind the quantizers.",
        ("penalty-on-latent",),
        parts=lambda parts: replace(parts, penalty=_penalty_on_latent),
    ),
    Fault(
        "coefficient ramps to 1",
        "The schedule's peak was left at 1, a hundred times what the network bears.",
        ("coefficient-too-large",),
        pipeline=lambda pipeline: replace(
            pipeline, coefficient=lambda epoch: pipeline.coefficient(epoch) / pipeline.coefficient(10**6)
        ),
    ),
    Fault(
        "BatchNorm in eval mode",
        "The network is in eval mode in every training step, so BatchNorm never learns its statistics.",
        ("batchnorm-in-eval",),
        pipeline=_batchnorm_in_eval,
    ),
    Fault(
        "sparsity of latent weights",
        "Zeros and dead filters are counted on the float weights, which have none.",
        ("sparsity-on-latent",),
        pipeline=layers(_zeros_of_latent),
    ),
    Fault(
        "half of the test set",
        "Only the first half of the test images is evaluated.",
        ("partial-test-set",),
        pipeline=accuracy(_half_of_the_test_set),
    ),
)
FAULTS: dict[str, Fault] = {fault.name: fault for fault in _CATALOGUE}
BREAKS: dict[str, str] = {HEALTHY: "Nothing is broken.", **{name: fault.breaks for name, fault in FAULTS.items()}}
