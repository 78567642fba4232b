"""Pipelines of one's own: healthy ones pass; what cannot be used is a finding, the rest goes on, nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.doctor import Pipeline, Report, before, first_steps
from experiments.doctor.examine import examine, while_training
from experiments.doctor.expected import Expected
from experiments.doctor.pipeline import raw_images, step_losses
from experiments.doctor.report import NOT_JUDGED, PASSED
from experiments.notebook.demonstration import healthy, small_config, small_data
from src.data import ImageData
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers

Step = Callable[[Tensor, Tensor], Any]


class PlainNetwork(nn.Module):
    """Someone's own network: no residual connection, a hidden linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, stride=2)
        self.hidden, self.head = nn.Linear(8 * 9, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.norm(self.first(x)))))
        return self.head(F.relu(self.hidden(x.flatten(1))))


class SignDescent:
    """An optimizer that is not torch's: p <- p - rate sign(gradient)."""

    def __init__(self, parameters: Iterator[nn.Parameter], rate: float = 0.003) -> None:
        self.parameters, self.rate, self.calls = list(parameters), rate, 0

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.calls += 1
        for p in self.parameters:
            if p.grad is not None:
                p.sub_(self.rate * p.grad.sign())


class Own:
    """A plain network, SGD and a step function that holds both, on images whose brightness is their class."""

    def __init__(self, optimizer: Callable[..., Any] = torch.optim.SGD, *, quantized: bool = True) -> None:
        torch.manual_seed(3)
        self.model: Any = PlainNetwork()
        if quantized:
            attach_weight_quantizers(self.model, ["first"], DeadZoneLDZCompander, {})
        settings = {"lr": 0.05, "momentum": 0.9} if optimizer is torch.optim.SGD else {}
        self.optimizer = optimizer(self.model.parameters(), **settings)
        labels = torch.arange(96) % 3
        images = torch.randn(96, 1, 8, 8) + labels[:, None, None, None].float() - 1
        order = torch.randperm(96)
        self.batches: Any = [(images[part], labels[part]) for part in order.split(24)]
        self.kept = {name: value.clone() for name, value in self.model.state_dict().items()}

    @property
    def unchanged(self) -> bool:
        now = self.model.state_dict()
        return now.keys() == self.kept.keys() and all(torch.equal(now[name], self.kept[name]) for name in now)

    def step(self, images: Tensor, labels: Tensor) -> Any:
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def pipeline(self, step: Step | None = None, **parts: Any) -> Pipeline:
        given = {"expected": Expected(num_classes=3, input_size=(1, 8, 8))} | parts
        return Pipeline.of_parts(self.model, self.optimizer, self.batches, step or self.step, **given)


def causes_of(report: Report) -> list[str]:
    return [cause.key for cause in report.diagnosis[:2]]


def statuses(report: Report) -> dict[str, str]:
    return {finding.name: finding.status for finding in report.findings}


# Healthy pipelines of other forms than the project's own.


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, SignDescent])
def test_a_pipeline_of_ones_own_passes_and_is_left_as_it_was(optimizer: Callable[..., Any]) -> None:
    own = Own(optimizer)
    report = examine(own.pipeline(tests=own.batches))
    assert not report.faulty, report.text(passed=False)
    found = statuses(report)
    passed = {name for name, status in found.items() if status == PASSED}
    assert {"gradients", "one batch", "toggling", "loss at the start"} <= passed
    assert own.unchanged
    if isinstance(own.optimizer, SignDescent):
        assert found["kind of optimizer"] == NOT_JUDGED
        assert own.optimizer.calls == 0
    else:
        assert {"update", "only what it should"} <= passed


def test_an_optimizer_that_calls_backward_itself_passes() -> None:
    own = Own(torch.optim.LBFGS)

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
    report = before(Pipeline.of_parts(own.model, optimizer, own.batches, own.step))
    assert not report.faulty, report.text(passed=False)
    assert statuses(report)["every parameter once"] == NOT_JUDGED


def test_an_endless_loader_does_not_hang() -> None:
    own = Own()
    held = own.batches

    def endless(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        first = epoch % len(held)
        while True:
            yield from held[first:] + held[:first]

    own.batches = endless
    report = examine(own.pipeline())
    assert not report.faulty, report.text(passed=False)


@pytest.mark.parametrize("name", ["coefficient", "lambda_", "penalty"])
def test_a_step_gets_the_coefficient_by_name_alone(name: str) -> None:
    own, heard = Own(), list[Any]()
    place: dict[str, Any] = {"own": own, "heard": heard}
    exec(
        f"def step(images, labels, amp=True, {name}=9.0): heard.append((amp, {name})); return own.step(images, labels)",
        place,
    )
    own.pipeline(place["step"]).take_step(*own.batches[0], 0.25)
    own.pipeline(lambda images, labels, amp=True: heard.append(amp)).take_step(*own.batches[0], 0.25)
    assert heard == [(True, 0.25), True]


@pytest.mark.parametrize(
    ("told", "total", "task"),
    [(2.5, 2.5, 2.5), ({"loss": torch.tensor([2.5])}, 2.5, 2.5), ({"total": 3.0, "task": 2.0, "other": "x"}, 3.0, 2.0)],
)
def test_a_step_may_return_its_loss_in_a_dict(told: Any, total: float, task: float) -> None:
    losses = step_losses(told)
    assert (float(losses.total), float(losses.task), float(losses.groups)) == (total, task, 0.0)


@pytest.mark.parametrize("told", [None, {"accuracy": 0.5}, (torch.tensor(1.0), torch.zeros(3))])
def test_a_step_without_a_loss_says_what_is_wanted(told: Any) -> None:
    with pytest.raises(
        ValueError, match=f"returned {'None' if told is None else type(told).__name__}; return the loss"
    ):
        step_losses(told)


def test_raw_images_may_be_arrays_of_any_size_and_layout() -> None:
    images, labels = torch.randint(256, (6, 3, 40, 24), dtype=torch.uint8), torch.arange(6) % 3
    for given in (images, images.permute(0, 2, 3, 1).numpy()):
        data = raw_images((given, labels.numpy()))
        assert torch.equal(data.train_images, images)
        assert (data.num_classes, len(data.test_images)) == (3, 0)
    grey = raw_images(((images[:, 0], labels), (images[:2, 0], labels[:2])), 5)
    assert (grey.train_images.shape, grey.test_images.shape, grey.num_classes) == ((6, 1, 40, 24), (2, 1, 40, 24), 5)


@pytest.mark.parametrize("measure", [None, lambda: 0.9, lambda pipeline, means, epoch, seconds: torch.tensor(0.9)])
def test_training_is_watched_with_a_number_of_epochs_alone(measure: Any) -> None:
    own = Own()
    report = examine(own.pipeline(epochs=3, measure=measure))
    assert not report.faulty, report.text(passed=False)
    found = statuses(report)
    assert {found[name] for name in ("training runs", "epochs go on", "all keep moving")} == {PASSED}
    assert own.model.norm.num_batches_tracked == 12
    assert ("what is measured of an epoch" in report.headline) == (measure is None)
    unwatched = examine(Own().pipeline())
    assert "the training (give epochs=)" in unwatched.headline


@pytest.mark.parametrize("clearing", [True, False])
def test_a_step_with_a_schedule_and_clipping_starts_its_schedule_anew_and_clears_its_gradients(clearing: bool) -> None:
    """Gradients that add up keep their length where they are clipped, and on one batch their direction, too."""
    own = Own()
    schedule = torch.optim.lr_scheduler.LambdaLR(own.optimizer, lambda t: 1 - t / 1000)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(own.model(images), labels)
        if clearing:
            own.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(own.model.parameters(), 0.1)
        own.optimizer.step()
        schedule.step()
        return loss.detach()

    pipeline = own.pipeline(step)
    report = before(pipeline) + first_steps(pipeline)
    assert (schedule.last_epoch, own.optimizer.param_groups[0]["lr"]) == (0, 0.05)
    assert report.faulty != clearing, report.text(passed=False)
    assert clearing or "gradients-accumulate" in causes_of(report)


# What cannot be used.


def test_a_network_without_quantizers_is_a_finding_where_some_are_expected_and_the_rest_goes_on() -> None:
    report = examine(Own(quantized=False).pipeline(expected=Expected(quantized=("conv",))))
    assert [finding.name for finding in report.failed] == ["layers quantized"]
    assert causes_of(report)[0] == "no-quantizers"
    assert statuses(report)["one batch"] == PASSED


def test_nothing_is_said_of_quantizers_where_there_are_none_and_none_are_expected() -> None:
    report = examine(Own(quantized=False).pipeline())
    assert not report.faulty, report.text(passed=False)
    assert statuses(report)["layers quantized"] == NOT_JUDGED


IMAGES = torch.zeros(4, 1, 8, 8)


def unreadable(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("batches", "cause"),
    [
        ([], "loader-empty"),
        ([(IMAGES, torch.zeros(4, 2))], "loader-shapes"),
        ([(IMAGES, torch.tensor([0, 1, 2, 7]))], "loader-shapes"),
        ([IMAGES], "loader-shapes"),
        (iter([(IMAGES, torch.zeros(4, dtype=torch.int64))]), "loader-used-up"),
        (unreadable, "loader-raises"),
    ],
)
def test_a_loader_that_gives_nothing_usable_is_a_finding(batches: Any, cause: str) -> None:
    own = Own()
    own.batches = batches
    report = examine(own.pipeline())
    assert causes_of(report)[0] == cause
    assert statuses(report)["toggling"] == PASSED
    assert batches is not unreadable or "the disk is gone" in report.text(passed=False)


@pytest.mark.parametrize(("tests", "cause"), [([], "loader-empty"), ([3], "loader-shapes")])
def test_a_test_loader_that_cannot_be_used_is_a_finding(tests: list[Any], cause: str) -> None:
    assert causes_of(before(Own().pipeline(tests=tests)))[0] == cause


def raising(error: BaseException, calls: int) -> Callable[[Own], Step]:
    """A step that raises after the network was changed, at its call number `calls`."""

    def make(own: Own) -> Step:
        left = [calls]

        def step(images: Tensor, labels: Tensor) -> Any:
            loss = own.step(images, labels)
            left[0] -= 1
            if not left[0]:
                raise error
            return loss

        return step

    return make


STEPS: dict[str, tuple[Callable[[Own], Callable[..., Any]], str]] = {
    "raises": (raising(RuntimeError("no"), 1), "step-raises"),
    "raises at its third call": (raising(RuntimeError("no"), 3), "step-raises"),
    "leaves the program": (raising(SystemExit(3), 1), "step-raises"),
    "returns nothing": (lambda own: lambda images, labels: own.step(images, labels) and None, "step-returns-no-loss"),
    "returns a loss an image": (lambda own: lambda images, labels: torch.zeros(len(labels)), "step-returns-no-loss"),
    "returns no number": (lambda own: lambda images, labels: own.step(images, labels) * torch.nan, "loss-not-finite"),
    "takes other arguments": (lambda own: lambda: 0.0, "step-raises"),
    "does not tell its arguments": (lambda own: max, "step-raises"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_cannot_be_used_is_a_finding(name: str) -> None:
    own = Own()
    make, cause = STEPS[name]
    report = examine(own.pipeline(make(own)))
    assert cause in causes_of(report), report.text(passed=False)
    assert PASSED in statuses(report).values()
    assert own.unchanged
    assert not own.optimizer.state


def test_a_step_that_changes_more_than_its_optimizer_does_is_seen_and_undone() -> None:
    own = Own()
    head = own.model.head

    def exchanges(images: Tensor, labels: Tensor) -> Any:
        loss = own.step(images, labels)
        own.model.head = nn.Linear(16, 3)
        return loss

    def shifts(images: Tensor, labels: Tensor) -> Any:
        loss = own.step(images, labels)
        own.model.head.bias.data += 0.5
        return loss

    report = first_steps(own.pipeline(exchanges))
    assert "changes-too-much" in causes_of(report), report.text(passed=False)
    assert own.model.head is head
    report = first_steps(own.pipeline(shifts))
    (update,) = [finding for finding in report.failed if finding.name == "update"]
    assert "update-wrong" in [cause.key for cause in update.causes][:2]
    assert own.unchanged


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda model: model.half(), "dtype-mismatch"),
        (lambda model: model.double(), "dtype-mismatch"),
        (lambda model: model.head.to("meta"), "device-mismatch"),
        (lambda model: model.second.parametrizations.weight.original.data.fill_(torch.nan), "weights-not-finite"),
    ],
    ids=["half", "double", "no data", "not a number"],
)
def test_a_network_of_another_type_or_place_is_named(change: Callable[[Any], Any], cause: str) -> None:
    own = Own()
    change(own.model)
    report = examine(own.pipeline(tests=own.batches))
    assert cause in causes_of(report), report.text(passed=False)
    assert PASSED in statuses(report).values()


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
