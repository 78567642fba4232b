"""The doctor on starts that are legal, accuracies that are luck, and networks counted by hand."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from experiments.doctor import Expected, Pipeline
from experiments.doctor.checks.network import network_checks
from experiments.doctor.checks.reported import Reported, reported_checks
from experiments.doctor.pipeline import plain_record
from experiments.doctor.reference.accounting import Account, layers_of, needed_channels
from experiments.doctor.report import AFTERWARDS, BEFORE, FAILED, PASSED, TRAINING, Report
from experiments.doctor.runner import CheckRunner
from experiments.doctor.training.records import EpochView
from experiments.doctor.training.training_checks import Watched, training_checks
from experiments.notebook.demonstration import healthy, small_config
from src.runs import CHECKPOINT, RunFolder, RunProgress
from src.training import EpochMeans, History, Step, StepLosses
from tests.networks import IMAGE, Chain, randomize


class Branch(nn.Module):
    """x + a branch whose last BatchNorm has a scale of 0, as `zero_init_residual` has it."""

    def __init__(self, zero: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), zero)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.branch(x)).relu().mean((2, 3)))


class Tokens(nn.Module):
    """Patches with a class token and positions that start at 0, and an encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, 5, 16))
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


def zero_norm() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    nn.init.zeros_(norm.weight)
    return norm


def zero_convolution() -> nn.Module:
    last = nn.Conv2d(8, 8, 1)
    nn.init.zeros_(last.weight)
    return last


def zero_head() -> nn.Module:
    network = Branch(nn.Identity())
    nn.init.zeros_(network.head.weight)
    return network


def with_weight_norm() -> nn.Module:
    network = Branch(nn.Identity())
    weight_norm(network.stem)
    return network


@pytest.mark.parametrize(
    "make",
    [
        lambda: Branch(zero_norm()),
        lambda: Branch(zero_convolution()),
        zero_head,
        Tokens,
        with_weight_norm,
    ],
    ids=["zero_init_residual", "zero convolution", "zero head", "tokens", "weight norm"],
)
def test_legal_starts_raise_nothing(make: Any) -> None:
    torch.manual_seed(0)
    model = make()
    batches = [(torch.randn(32, 3, 8, 8), torch.arange(32) % 4) for _ in range(4)]
    expected = Expected(num_classes=4, input_size=(3, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pipeline = Pipeline.of_parts(model, optimizer, batches, lambda images, labels: 0.0, expected=expected)
    runner = CheckRunner(BEFORE, pipeline)
    network_checks(runner, pipeline)
    report = Report(tuple(runner.findings))
    assert not report.failed, report.text()
    assert {f.name for f in report.findings if f.status == PASSED} >= {"network", "starting weights"}


def one_step_means() -> EpochMeans:
    zero = torch.zeros(())
    means = EpochMeans()
    means.add(Step(0, 1, 1, StepLosses(total=zero, task=zero, logits=zero, groups=zero, correct=zero)))
    return means


@pytest.mark.parametrize(
    ("accuracies", "status"),
    [
        ((0.10, 0.153), FAILED),  # 360 test images: 0.1 + 4 sqrt(0.1 x 0.9 / 360) = 0.163
        ((0.10, 0.17), PASSED),
        ((0.19, 0.10, 0.10), FAILED),  # below 2/K, and back at chance in the end
        ((0.60, 0.10, 0.10), PASSED),  # a collapse, which is another check's affair
        ((0.60, 0.10, 0.40), PASSED),
    ],
)
def test_what_luck_gives_is_not_above_chance(accuracies: tuple[float, ...], status: str) -> None:
    pipeline = healthy()
    assert pipeline.data is not None
    assert len(pipeline.data.test_labels) == 360
    records = [plain_record(pipeline, one_step_means(), n, 0.0, value) for n, value in enumerate(accuracies)]
    runner = CheckRunner(TRAINING, pipeline)
    training_checks(runner, Watched(pipeline, [EpochView(record) for record in records], steps=100))
    assert {f.name: f.status for f in runner.findings}["above chance"] == status


@pytest.mark.parametrize(("change", "status"), [({"given": ("seed",)}, PASSED), ({"seed": 5}, FAILED)], ids=str)
def test_only_settings_that_shape_a_result_are_compared(change: dict[str, Any], status: str, tmp_path: Path) -> None:
    """What was typed (`given`) differs between a run and the notebook that goes on with it."""
    config = small_config()
    pipeline = healthy(config)
    pipeline.take_step(*pipeline.first_batches(1)[0], 0.0)
    saved = asdict(replace(config, **change))
    RunFolder(tmp_path).save_progress(pipeline.model, pipeline.optimizer, RunProgress(History(8)), saved, "")
    runner = CheckRunner(AFTERWARDS, pipeline)
    reported_checks(runner, replace(pipeline, evaluate=None, measure=None), Reported(checkpoint=tmp_path / CHECKPOINT))
    assert {f.name: f.status for f in runner.findings}["going on"] == status


@torch.no_grad()
def test_a_chain_counted_by_hand() -> None:
    model = randomize(Chain(), 3).float()
    model.conv1.weight[1] = 0  # its channel is constant behind bn1
    model.linear.weight[:, 2] = 0  # nothing reads channel 2 of conv2
    model.conv2.weight[:, 0] = 0  # nor channel 0 of conv1
    layers = layers_of(model, None, IMAGE)
    assert [layer.dense for layer in layers] == [3 * 2 * 9 * 36, 4 * 3 * 9 * 36, 2 * 4]
    counted = Account().figures(layers)
    assert counted["MACs of non-zero weights"].tolist() == [2 * 2 * 9 * 36, 4 * 2 * 9 * 36, 2 * 3]
    assert counted["dead filters"].tolist() == [0, 1, 0, *[0] * 4, *[0] * 2]
    needed = needed_channels(model, torch.randn(64, *IMAGE, generator=torch.Generator().manual_seed(0)))
    flags = {name: [each.tolist() for each in pair] for name, pair in needed.items()}
    assert flags["conv1"] == [[False, False, True], [True, True]]
    assert flags["conv2"] == [[True, True, False, True], [False, False, True]]
    assert flags["linear"] == [[True, True], [True, True, False, True]]
