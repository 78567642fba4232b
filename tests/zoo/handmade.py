"""Small networks of one topology each, with the number of their removable channels counted by hand.

Every one takes images of (3, 12, 12), `IMAGE`. A removable channel is counted once, wherever it is carried on to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.cases import CLASSES, Case

IMAGE = (3, 12, 12)


def stage(channels: int, filters: int, **settings: int) -> nn.Sequential:
    """Convolution of 3x3, BatchNorm, ReLU."""
    convolution = nn.Conv2d(channels, filters, 3, padding=1, bias=False, **settings)
    return nn.Sequential(convolution, nn.BatchNorm2d(filters), nn.ReLU())


def scores(channels: int) -> nn.Sequential:
    """Mean over the pixels, then one linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class Body(nn.Module):
    """A first stage 3->8, what a topology does with its 8 channels, a last stage to 5 channels, the scores."""

    def __init__(self, middle: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.first, self.middle, self.last, self.head = stage(3, 8), middle, stage(channels, 5), scores(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.middle(self.first(x))))


def plain() -> nn.Module:
    return nn.Sequential(stage(3, 8), nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), stage(8, 6), scores(6))


def depthwise() -> nn.Module:
    """The depthwise filters carry the first stage's channels on: they add none."""
    return Body(nn.Sequential(stage(8, 8, groups=8), nn.Conv2d(8, 6, 1), nn.ReLU6()), 6)


class SqueezeExcitation(nn.Module):
    """Channels times gates: a gate and its channel go together."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class Dense(nn.Module):
    """What was read is read again beside what was made of it: 8 + 3 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.more = stage(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.more(x)], 1)


class Halves(nn.Module):
    """Four of eight channels go through a layer and meet the other four: of each pair one channel is left."""

    def __init__(self) -> None:
        super().__init__()
        self.one = stage(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return self.one(left) + right


def activations() -> nn.Module:
    """PReLU with a slope per channel, and functions that do not keep 0."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(8), nn.Conv2d(8, 6, 3, padding=1), nn.SiLU(),
        nn.Conv2d(6, 5, 3, padding=1), nn.Sigmoid(), scores(5),
    )  # fmt: skip


def transposed() -> nn.Module:
    """Half the size and back: an image of 7 channels comes out."""
    return nn.Sequential(
        stage(3, 8, stride=2), nn.ConvTranspose2d(8, 5, 2, stride=2), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Upsample(scale_factor=2), nn.Conv2d(5, CLASSES, 3, padding=1),
    )  # fmt: skip


class ChannelsLast(nn.Module):
    """Two linear layers over the channels of every pixel, beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.wide(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class Several(nn.Module):
    """Scores behind the last stage and, in a dictionary with them, behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head, self.early = stage(3, 8), stage(8, 5), scores(5), scores(8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        return {"scores": self.head(self.last(x)), "early": self.early(x)}


class WritesThroughAView(nn.Module):
    """ReLU in place on a view: the layer that reads the viewed value afterwards reads it behind the ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.flat = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 144, CLASSES)
        self.last, self.head = stage(8, 5), scores(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        view = F.relu(x.view(x.size(0), -1), inplace=True)
        return self.flat(view) + self.head(self.last(x))


def hooked() -> nn.Module:
    """A hook changes what the first convolution returns: that layer and its channels stay as they are."""
    network = nn.Sequential(stage(3, 8), stage(8, 5), scores(5))
    network[0][0].register_forward_hook(lambda layer, inputs, output: 2 * output + 1)
    return network


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))))


class Twice(nn.Module):
    """One layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(F.relu(self.layer(x))))


class LayerScale(nn.Module):
    """A parameter of the network's own, one number a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class AssertsShape(nn.Module):
    """Reads its input's shape, and branches on it."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        assert channels == 8, "eight channels are needed"
        return x if height == width else x.view(batch, channels, width, height)


class Mixing(nn.Module):
    """An operation that mixes all channels: what touches it stays."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, dim=1)


class Attention(nn.Module):
    """Self-attention over the pixels beside the identity: what touches it stays."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return (tokens + attended).transpose(1, 2).unflatten(2, x.shape[2:])


def odd_names() -> nn.Module:
    """Names with a dash, a number and many levels."""
    deep: nn.Module = stage(3, 8)
    for _ in range(15):
        deep = nn.Sequential(OrderedDict({"a-level": deep}))
    return nn.Sequential(deep, stage(8, 5), scores(5))


def _body(middle: Callable[[], nn.Module], channels: int = 8) -> Callable[[], nn.Module]:
    return lambda: Body(middle(), channels)


HANDMADE = {
    "plain": Case(plain, IMAGE, 8 + 6),
    "depthwise": Case(depthwise, IMAGE, 8 + 6 + 5),
    "grouped": Case(_body(lambda: stage(8, 6, groups=2), 6), IMAGE, 8 + 6 + 5),
    "squeeze-excitation": Case(_body(SqueezeExcitation), IMAGE, 8 + 3 + 5),
    "concat": Case(_body(Dense, 11), IMAGE, 8 + 3 + 5),
    "chunk": Case(_body(Halves, 4), IMAGE, 4 + 4 + 5),
    "activations": Case(activations, IMAGE, 8 + 6 + 5),
    "transposed convolution": Case(transposed, IMAGE, 8 + 5),
    "linear on channels-last": Case(_body(ChannelsLast), IMAGE, 8 + 16 + 5),
    "several outputs": Case(Several, IMAGE, 8 + 5),
    "write through a view": Case(WritesThroughAView, IMAGE, 5),
    "forward hook": Case(hooked, IMAGE, 5),
    "tied weights": Case(_body(Tied), IMAGE, 5),
    "shared layer": Case(_body(Twice), IMAGE, 5),
    "layer scale": Case(_body(LayerScale), IMAGE, 8 + 5),
    "shape assertion": Case(_body(AssertsShape), IMAGE, 8 + 5),
    "softmax inside": Case(_body(Mixing), IMAGE, 5),
    "attention": Case(_body(Attention), IMAGE, 5),
    "odd names": Case(odd_names, IMAGE, 8 + 5),
}
