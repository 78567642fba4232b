"""What a pipeline may hand to the doctor that it cannot use: it is a finding, the rest goes on, nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.doctor import Pipeline, Report, before, first_steps
from experiments.doctor.core.expected import Expected
from experiments.doctor.core.findings import NOT_APPLICABLE, PASSED
from experiments.doctor.demonstration import healthy, small_config, small_data
from experiments.doctor.examine import examine, while_training
from src.data import ImageData
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers

PROMISE = Expected(num_classes=3, input_size=(1, 8, 8))


class Own:
    """A small network with a step function of its own, on images whose brightness is their class."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(), nn.Flatten(), nn.Linear(128, 3),
        )  # fmt: skip
        attach_weight_quantizers(self.model, ["0"], DeadZoneLDZCompander, {})
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), 1e-2)
        labels = torch.arange(96) % 3
        images = torch.randn(96, 1, 8, 8) + labels[:, None, None, None].float() - 1
        self.batches: Any = list(zip(images.split(24), labels.split(24), strict=True))

    def step(self, images: Tensor, labels: Tensor) -> Any:
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def pipeline(self, step: Callable[..., Any] | None = None, **parts: Any) -> Pipeline:
        given = {"expected": PROMISE} | parts
        return Pipeline.of_parts(self.model, self.optimizer, self.batches, step or self.step, **given)


def causes_of(report: Report) -> list[str]:
    return [cause.key for cause in report.diagnosis[:2]]


def some_passed(report: Report) -> bool:
    return any(finding.status == PASSED for finding in report.findings)


def test_a_pipeline_of_ones_own_passes() -> None:
    own = Own()
    report = examine(own.pipeline(tests=own.batches))
    assert not report.faulty, report.text(passed=False)


def test_an_optimizer_that_calls_backward_itself_passes() -> None:
    own = Own()
    own.optimizer = torch.optim.LBFGS(own.model.parameters(), lr=0.1)

    def step(images: Tensor, labels: Tensor) -> float:
        def closure() -> float:
            own.optimizer.zero_grad()
            loss = F.cross_entropy(own.model(images), labels)
            loss.backward()
            return float(loss.detach())

        return float(own.optimizer.step(closure))

    report = examine(own.pipeline(step))
    assert not report.faulty, report.text(passed=False)


@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_no_optimizer_is_not_applicable(optimizer: Any) -> None:
    own = Own()
    pipeline = Pipeline.of_parts(own.model, optimizer, own.batches, own.step, expected=PROMISE)
    report = before(pipeline)
    assert not report.faulty, report.text(passed=False)
    assert {f.status for f in report.findings if f.name == "every parameter once"} == {NOT_APPLICABLE}


def test_a_generator_for_a_loader_is_named() -> None:
    own = Own()
    own.batches = (batch for batch in own.batches)
    report = examine(own.pipeline())
    assert causes_of(report)[0] == "loader-used-up"
    assert some_passed(report)


def test_an_endless_loader_does_not_hang() -> None:
    own = Own()
    held = own.batches

    def endless(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from held

    own.batches = endless
    assert not examine(own.pipeline()).faulty


def raising(error: BaseException, calls: int) -> Callable[[Own], Callable[..., Any]]:
    """A step that raises at its call number `calls`."""

    def make(own: Own) -> Callable[..., Any]:
        left = [calls]

        def step(images: Tensor, labels: Tensor) -> Any:
            left[0] -= 1
            if not left[0]:
                raise error
            return own.step(images, labels)

        return step

    return make


STEPS: dict[str, tuple[Callable[[Own], Callable[..., Any]], str]] = {
    "raises": (raising(RuntimeError("no"), 1), "step-raises"),
    "raises at its third call": (raising(RuntimeError("no"), 3), "step-raises"),
    "leaves the program": (raising(SystemExit(3), 1), "step-raises"),
    "returns nothing": (lambda own: lambda images, labels: own.step(images, labels) and None, "step-raises"),
    "returns a loss an image": (lambda own: lambda images, labels: torch.zeros(len(labels)), "step-raises"),
    "returns no number": (lambda own: lambda images, labels: own.step(images, labels) * torch.nan, "loss-not-finite"),
    "takes other arguments": (lambda own: lambda: 0.0, "step-raises"),
    "does not tell its arguments": (lambda own: max, "step-raises"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_cannot_be_used_is_a_finding(name: str) -> None:
    own = Own()
    make, cause = STEPS[name]
    kept = {key: value.clone() for key, value in own.model.state_dict().items()}
    report = examine(own.pipeline(make(own)))
    assert cause in causes_of(report), report.text(passed=False)
    assert some_passed(report)
    assert all(torch.equal(kept[key], value) for key, value in own.model.state_dict().items())


def test_a_step_that_exchanges_a_layer_is_a_finding_and_the_layer_is_put_back() -> None:
    own = Own()
    head = own.model[6]

    def step(images: Tensor, labels: Tensor) -> Any:
        loss = own.step(images, labels)
        own.model[6] = nn.Linear(128, 3)
        return loss

    report = first_steps(own.pipeline(step))
    assert "changes-too-much" in causes_of(report), report.text(passed=False)
    assert own.model[6] is head


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda model: model.half(), "dtype-mismatch"),
        (lambda model: model.double(), "dtype-mismatch"),
        (lambda model: model[6].to("meta"), "device-mismatch"),
        (lambda model: model[3].parametrizations.weight.original.data.fill_(torch.nan), "weights-not-finite"),
    ],
    ids=["half", "double", "no data", "not a number"],
)
def test_a_network_of_another_type_or_place_is_named(change: Callable[[Any], Any], cause: str) -> None:
    own = Own()
    change(own.model)
    report = examine(own.pipeline(tests=own.batches))
    assert cause in causes_of(report), report.text(passed=False)
    assert some_passed(report)


@pytest.mark.parametrize(("tests", "cause"), [([], "loader-empty"), ([3], "loader-shapes")])
def test_a_test_loader_that_cannot_be_used_is_a_finding(tests: list[Any], cause: str) -> None:
    assert causes_of(before(Own().pipeline(tests=tests)))[0] == cause


def test_parts_that_raise_while_training_are_told_apart(tmp_path: Any) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError("the disk is full")

    pipeline = healthy(small_config(epochs=1))
    expected = {
        "measure-raises": replace(pipeline, measure=lambda *_: None),  # type: ignore[arg-type, return-value]
        "saving-raises": replace(pipeline, save=refuse),
        "step-raises": replace(pipeline, step=refuse),
    }
    for cause, broken in expected.items():
        seen, _ = while_training(broken, tmp_path)
        assert causes_of(seen)[0] == cause, seen.text(passed=False)


def test_a_step_of_every_epoch_is_taken_apart(tmp_path: Any) -> None:
    seen, _ = while_training(healthy(small_config(epochs=2)), tmp_path)
    told = {finding.name: finding for finding in seen.findings if finding.name.endswith("mid-run")}
    assert len(told) == 5
    assert {finding.status for finding in told.values()} == {PASSED}
    assert all(finding.measured.startswith("2 epochs") for finding in told.values())


def test_swapped_colours_of_the_test_images_are_seen() -> None:
    digits = small_data()

    def tinted(images: Tensor) -> Tensor:
        """Red a little above green, blue a little below, by an amount that differs from image to image."""
        amount = torch.linspace(4, 12, len(images))[:, None, None]
        red, green, blue = images.float().unbind(1)
        return torch.stack([red + amount, green, blue - amount], 1).clamp(0, 255).to(torch.uint8)

    data: ImageData = replace(digits, train_images=tinted(digits.train_images), test_images=tinted(digits.test_images))
    pipeline = replace(healthy(small_config()), data=data)
    assert not [f for f in before(pipeline).failed if f.name == "like parts"]
    swapped = replace(pipeline, data=replace(data, test_images=data.test_images.flip(1)))
    found = [f for f in before(swapped).failed if f.name == "like parts"]
    assert found
    assert found[0].causes[0].key == "channels-swapped"
