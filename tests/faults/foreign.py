"""Healthy pipelines that are not the project's: what is ordinary elsewhere must not raise an alarm.

for case in FOREIGN.values():
    assert not examine(case.build()).faulty

Each is a tiny network on 192 images of three classes, which differ in brightness. Axis letters: N images, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parametrizations
from torch.optim.lr_scheduler import LambdaLR
from torchvision.transforms import v2

from experiments.doctor import Expected, Pipeline

CLASSES, SIZE, BATCH = 3, 16, 24
SHAPE = (3, SIZE, SIZE)
MEAN, STD = 0.45, 0.2
PROMISE = Expected(quantized=(), num_classes=CLASSES, input_size=SHAPE)
NO_SQUARES = replace(PROMISE, lambda_dz=0.0, lambda_bit=0.0)
Step = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Foreign:
    """name: for tables; what: one sentence; build: makes the pipeline anew."""

    name: str
    what: str
    build: Callable[[], Pipeline]


def raw_images(count: int = 192, seed: int = 0) -> tuple[Tensor, Tensor]:
    """uint8 (N, C, 16, 16), a smooth pattern of its own in every image, brighter with the class; labels (N,)."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    coarse = torch.rand(count, 3, 4, 4, generator=random)
    smooth = F.interpolate(coarse, (SIZE, SIZE), mode="bilinear") + 0.2 * torch.rand(count, *SHAPE, generator=random)
    return (255 * (0.15 * labels[:, None, None, None] + 0.5 * smooth).clamp(0, 1)).to(torch.uint8), labels


def normalised(images: Tensor) -> Tensor:
    """uint8 -> float, (x / 255 - MEAN) / STD."""
    return (images.float() / 255 - MEAN) / STD


class Net(nn.Module):
    """Two convolutions with a residual connection, BatchNorm and a linear head."""

    def __init__(self, last_scale: float = 1.0) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        nn.init.constant_(self.norm2.weight, last_scale)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(x + self.norm2(self.conv(x))).mean((2, 3)))


class Attention(nn.Module):
    """Patches, a class token and positions that start at 0, and a TransformerEncoderLayer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, 17, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.layer(x)[:, 0])


class Lion(torch.optim.Optimizer):
    """An optimizer of one's own: p <- p - rate sign(0.9 m + 0.1 g), m <- 0.99 m + 0.01 g."""

    def __init__(self, parameters: Any, lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    p.sub_(group["lr"] * (0.9 * m + 0.1 * p.grad).sign())
                    m.mul_(0.99).add_(0.01 * p.grad)


class Setup:
    """A network, an optimizer and a loader that shuffles; `step` is the plain one."""

    def __init__(self, model: nn.Module | None = None, optimizer: Callable[[Any], Any] | None = None) -> None:
        torch.manual_seed(0)
        self.model = model or Net()
        make = optimizer or partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        self.optimizer = make([p for p in self.model.parameters() if p.requires_grad])
        self.images, self.labels = raw_images()
        self.transform: Callable[[Tensor], Tensor] = normalised
        self.target: Callable[[Tensor], Tensor] = lambda labels: labels

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(epoch))
        for part in order.split(BATCH):
            yield self.transform(self.images[part]), self.target(self.labels[part])

    def update(self, loss: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def step(self, images: Tensor, labels: Tensor) -> Any:
        return self.update(F.cross_entropy(self.model(images), labels))

    def pipeline(self, step: Step | None = None, **parts: Any) -> Pipeline:
        given = {"epochs": 2, "expected": PROMISE} | parts
        return Pipeline.of_parts(self.model, self.optimizer, self.batches, step or self.step, **given)


# Other steps, rates and optimizers.


def plain() -> Pipeline:
    own = Setup()
    return Pipeline.of_parts(own.model, own.optimizer, own.batches, own.step)


def halves() -> Pipeline:
    own = Setup()

    def step(images: Tensor, labels: Tensor) -> Tensor:
        own.optimizer.zero_grad()
        total = torch.zeros(())
        for x, y in zip(images.chunk(2), labels.chunk(2), strict=True):
            loss = F.cross_entropy(own.model(x), y) / 2
            loss.backward()
            total += loss.detach()
        own.optimizer.step()
        return total

    return own.pipeline(step)


def every_second() -> Pipeline:
    own, calls = Setup(), [0]

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(own.model(images), labels)
        (loss / 2).backward()
        calls[0] += 1
        if calls[0] % 2 == 0:
            own.optimizer.step()
            own.optimizer.zero_grad()
        return loss.detach()

    return own.pipeline(step)


def sharpness_aware() -> Pipeline:
    own = Setup()
    weights = list(own.model.parameters())

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(own.model(images), labels)
        own.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            gradients = [p.grad.clone() for p in weights if p.grad is not None]
            scale = 0.05 / torch.stack([g.norm() for g in gradients]).norm()
            for p, g in zip(weights, gradients, strict=True):
                p.add_(scale * g)
        own.optimizer.zero_grad()
        F.cross_entropy(own.model(images), labels).backward()
        with torch.no_grad():
            for p, g in zip(weights, gradients, strict=True):
                p.sub_(scale * g)
        own.optimizer.step()
        return loss.detach()

    return own.pipeline(step)


def warm_up(start: float) -> Pipeline:
    own = Setup()
    schedule = LambdaLR(own.optimizer, lambda n: min(start + n / 8, 1.0))

    def step(images: Tensor, labels: Tensor) -> Any:
        loss = own.step(images, labels)
        schedule.step()
        return loss

    return own.pipeline(step)


# Other networks.


def frozen_norms() -> Pipeline:
    model = Net()
    norms = [model.norm, model.norm2]
    for norm in norms:
        norm.requires_grad_(False)
    own = Setup(model)

    def step(images: Tensor, labels: Tensor) -> Any:
        model.train()
        for norm in norms:
            norm.eval()
        return own.step(images, labels)

    return own.pipeline(step)


def weight_norm() -> Pipeline:
    model = Net()
    for layer in (model.stem, model.conv, model.head):
        parametrizations.weight_norm(layer)
    return Setup(model).pipeline()


def torch_qat() -> Pipeline:
    from torch.ao import quantization

    model = nn.Sequential(
        quantization.QuantStub(),
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 49, CLASSES),
        quantization.DeQuantStub(),
    )
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    return Setup(quantization.prepare_qat(model.train())).pipeline()


# Other data.


def soft_labels() -> Pipeline:
    own = Setup()
    own.target = lambda labels: 0.9 * F.one_hot(labels, CLASSES).float() + 0.1 / CLASSES
    return own.pipeline()


def bytes_normalised_in_the_step() -> Pipeline:
    own = Setup()
    own.transform = lambda images: images
    return own.pipeline(lambda images, labels: own.step(normalised(images), labels))


def transformed(transform: Callable[[Tensor], Tensor]) -> Pipeline:
    """With raw images, so that what the transform does to them is looked at."""
    own = Setup()
    own.transform = lambda images: torch.stack([transform(image) for image in images])
    images, labels = raw_images(60, seed=1)
    tests = [(normalised(images), labels)]
    promise = replace(PROMISE, mean=(MEAN,) * 3, std=(STD,) * 3)
    return own.pipeline(data=((own.images, own.labels), (images, labels)), tests=tests, expected=promise)


def training_images_alone() -> Pipeline:
    own = Setup()
    return own.pipeline(data=(own.images, own.labels))


# Other losses, each promised or left open.


def clipped() -> Pipeline:
    own = Setup()

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(own.model(images), labels)
        own.optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(own.model.parameters(), 0.1)
        own.optimizer.step()
        return loss.detach()

    return own.pipeline(step, expected=replace(NO_SQUARES, clip_norm=0.1))


def with_loss(loss: Callable[[nn.Module, Tensor, Tensor], Tensor], **promise: Any) -> Pipeline:
    own = Setup()
    expected = replace(NO_SQUARES, **promise) if promise else PROMISE
    return own.pipeline(lambda images, labels: own.update(loss(own.model, images, labels)), expected=expected)


def smoothed(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels, label_smoothing=0.1)


def mixed(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    share, order = float(torch.distributions.Beta(0.4, 0.4).sample()), torch.randperm(len(labels))
    scores = model(share * images + (1 - share) * images[order])
    return share * F.cross_entropy(scores, labels) + (1 - share) * F.cross_entropy(scores, labels[order])


def with_l1(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels) + 1e-3 * sum(p.abs().sum() for p in model.parameters())


def in_bfloat16(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(images)
    return F.cross_entropy(scores.float(), labels)


def distilled() -> Pipeline:
    torch.manual_seed(1)
    teacher = Net().eval()

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        scores = model(images)
        with torch.no_grad():
            told = teacher(images).softmax(1)
        return 0.5 * F.cross_entropy(scores, labels) + 0.5 * F.cross_entropy(scores, told)

    return with_loss(loss, objective="open")


_TO_FLOAT = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([MEAN] * 3, [STD] * 3)]
_JITTER = [v2.ToDtype(torch.float32, scale=True), v2.ColorJitter(0.3, 0.3)]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.05)


def augmented(*transforms: Any, after: bool = False) -> Callable[[], Pipeline]:
    """With transforms before an image is normalised, or after."""
    chain = [*_TO_FLOAT, *transforms] if after else [*transforms, *_TO_FLOAT]
    return partial(transformed, v2.Compose(chain))


_CASES = (
    ("no quantizers, nothing expected", "A plain network with no expectation at all.", plain),
    ("AdamW with decay", "AdamW with a decay of 0.05 on every parameter.", lambda: Setup(optimizer=adam).pipeline()),
    ("halves of a batch", "Gradients of two halves are added up before one update.", halves),
    ("an update every second call", "Gradients of two calls are added up before one update.", every_second),
    ("sharpness-aware", "The gradient is taken a little uphill (SAM).", sharpness_aware),
    ("warm-up from 0", "The learning rate rises from 0, a step at a time.", partial(warm_up, 0.0)),
    ("warm-up from a thousandth", "The learning rate rises from a thousandth.", partial(warm_up, 1e-3)),
    ("optimizer class of one's own", "Lion, written as torch's optimizers.", lambda: Setup(optimizer=Lion).pipeline()),
    ("zero_init_residual", "The last BatchNorm of a block starts at 0.", lambda: Setup(Net(0.0)).pipeline()),
    ("BatchNorm frozen", "Fine-tuning with BatchNorm in eval mode and its parameters fixed.", frozen_norms),
    ("TransformerEncoderLayer", "Attention with dropout.", lambda: Setup(Attention(0.1)).pipeline()),
    ("zero-initialised tokens", "Class token and positions start at 0.", lambda: Setup(Attention()).pipeline()),
    ("weight norm", "Every weight is a length times a direction.", weight_norm),
    ("torch.ao QAT", "torch's own fake quantization, whose observers grow.", torch_qat),
    ("soft labels", "The loader gives a probability a class.", soft_labels),
    ("bytes normalised in the step", "The loader gives uint8.", bytes_normalised_in_the_step),
    ("training images alone", "Raw images are given for the training set alone.", training_images_alone),
    ("RandAugment", "torchvision's RandAugment, before normalising.", augmented(v2.RandAugment())),
    ("float jitter", "Brightness and contrast vary in float.", augmented(*_JITTER)),
    ("erasing", "A random rectangle of every image is erased.", augmented(v2.RandomErasing(1.0), after=True)),
    (
        "crop after Normalize",
        "Normalised images are padded with 0.",
        augmented(v2.RandomCrop(SIZE, 2), after=True),
    ),
    ("clipped by norm", "The gradient's norm is clipped.", clipped),
    ("label smoothing", "Labels are smoothed in the loss.", partial(with_loss, smoothed, label_smoothing=0.1)),
    ("mixup", "Pairs of images and their labels are mixed.", partial(with_loss, mixed, objective="open")),
    ("mixup, not promised", "The same, and nobody said so.", partial(with_loss, mixed)),
    ("label smoothing, not promised", "The same, and nobody said so.", partial(with_loss, smoothed)),
    ("L1 term, not promised", "The same, and nobody said so.", partial(with_loss, with_l1)),
    ("distillation", "Half of the loss is a teacher's.", distilled),
    ("autocast", "The forward pass is in bfloat16.", partial(with_loss, in_bfloat16, objective=None)),
    (
        "L1 term",
        "The sum of the weights' absolute values is in the loss.",
        partial(with_loss, with_l1, objective="open"),
    ),
)
FOREIGN: dict[str, Foreign] = {name: Foreign(name, what, build) for name, what, build in _CASES}
