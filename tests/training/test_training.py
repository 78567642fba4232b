"""One step, one epoch, one evaluation, against plain implementations and sums done by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.sparsity import coupled_group_lasso
from resnet import BasicBlock, ResNet
from src import training
from src.data import ImageData, normalize
from src.pruning import channel_groups
from src.quantizer import DeadZoneLDZCompander
from src.runs import RunFolder
from src.training import (
    EpochMeans,
    LayerRecord,
    Objective,
    Step,
    StepLosses,
    TrainingError,
    cosine_to_zero,
    evaluate,
    hold_then_linear,
    layer_records,
    make_optimizer,
    measure_epoch,
    parameter_groups,
    pick_device,
    pick_precision,
    predict,
    squared_logits,
    train_epoch,
    train_step,
)
from src.training.evaluation import summary
from utils_quantization import attach_weight_quantizers, quantized_layers, toggle_quantization

RATES = {"learning_rate": 0.01, "dz_learning_rate": 0.02, "bit_learning_rate": 0.03}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(BasicBlock, [1, 1, 1], widths=(4, 8, 16))


def quantized(seed: int = 0, **settings: Any) -> ResNet:
    """Six quantizers; the dead zone starts wide enough for a good share of zeros."""
    model = network(seed)
    kwargs = {"init_deadzone_logit": 1.0, "init_bit_logit": 0.8, **settings}
    assert len(attach_weight_quantizers(model, ["conv1", "linear"], DeadZoneLDZCompander, kwargs)) == 6
    return model


def images(train: int = 64, test: int = 30) -> ImageData:
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return pixels, torch.randint(10, (count,), generator=generator)

    names = tuple("abcdefghij")
    return ImageData("noise", "noise", *draw(train), *draw(test), names, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def batch(count: int = 16) -> tuple[Tensor, Tensor]:
    data = images(count)
    return normalize(data.train_images, data.mean, data.std), data.train_labels


def optimizer_of(model: nn.Module, **decays: float) -> torch.optim.Optimizer:
    return make_optimizer(parameter_groups(model, **RATES, **decays))


def one_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: ImageData, **changes: Any) -> list[Step]:
    settings: dict[str, Any] = {
        "epoch": 0, "epochs": 3, "batch_size": 16, "coefficient": 0.0, "lr_lambda": lambda done: 1.0
    }  # fmt: skip
    objective = changes.pop("objective", Objective())
    return list(train_epoch(model, optimizer, data, objective, **{**settings, **changes}))


# --- the optimizer's groups


def test_every_trainable_parameter_is_in_exactly_one_group_with_its_own_rate_and_decay() -> None:
    model = quantized()
    model.bn1.bias.requires_grad_(False)
    groups = parameter_groups(model, **RATES, dz_decay=0.1, bit_decay=0.2)
    assert [(g["name"], g["lr"], g["base_lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("weights", 0.01, 0.01, 0.0, 8 + 1 + 13),  # 8 weights, 1 bias, 7 BatchNorms with scale and shift less one
        ("logit_dz", 0.02, 0.02, 0.1, 6),
        ("logit_bit", 0.03, 0.03, 0.2, 6),
    ]
    members = [id(p) for group in groups for p in group["params"]]
    assert len(members) == len(set(members))
    assert set(members) == {id(p) for p in model.parameters() if p.requires_grad}
    logits = {name: p for name, p in model.named_parameters() if ".logit_" in name}
    for index, leaf in ((1, "logit_dz"), (2, "logit_bit")):
        assert {id(p) for p in groups[index]["params"]} == {id(p) for n, p in logits.items() if n.endswith(leaf)}


def test_a_network_without_trained_logits_has_one_group() -> None:
    assert [g["name"] for g in parameter_groups(network(), **RATES)] == ["weights"]
    frozen = quantized(learnable_bit=False)
    assert [g["name"] for g in parameter_groups(frozen, **RATES)] == ["weights", "logit_dz"]


# --- one step


def plain_loss(model: nn.Module, x: Tensor, y: Tensor, dz: float, bit: float, coefficient: float) -> dict[str, Tensor]:
    """The objective without sharing, in the order of the equations, one channel and one logit at a time."""
    task = -torch.log_softmax(model(x), dim=1)[torch.arange(len(y)), y].mean()
    logits = torch.zeros(())
    for layer in quantized_layers(model).values():
        quantizer = cast(Any, layer).parametrizations.weight[0].quantizer
        logits = logits + dz * quantizer.logit_dz**2 + bit * quantizer.logit_bit**2
    groups, found = torch.zeros(()), channel_groups(model)
    for group in range(len(found)):
        squares = torch.zeros(())
        for module, parameter, dim, indices in found.slices(group):
            tensor = getattr(model.get_submodule(module), parameter)
            for index in indices:
                squares = squares + (tensor.select(dim, int(index)) ** 2).sum()
        if squares > 0:
            groups = groups + torch.sqrt(squares)
    return {"task": task, "logits": logits, "groups": groups, "total": task + logits + coefficient * groups}


def test_a_step_equals_a_plain_implementation_without_sharing() -> None:
    model = quantized()
    reference = copy.deepcopy(model)
    x, y = batch()
    optimizer = optimizer_of(model, dz_decay=0.5, bit_decay=0.25)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    reference.train()
    expected = plain_loss(reference, x, y, 0.02, 0.03, 0.1)
    expected["total"].backward()
    got = train_step(model.train(), optimizer, x, y, Objective(coupled_group_lasso(model), 0.02, 0.03), 0.1)

    for part, value in expected.items():
        assert value.item() > 0
        torch.testing.assert_close(getattr(got, part), value.detach(), rtol=1e-5, atol=1e-6)
    theirs = dict(reference.named_parameters())
    rates = {"logit_dz": (0.02, 0.5), "logit_bit": (0.03, 0.25)}
    for name, p in model.named_parameters():
        gradient = theirs[name].grad
        assert gradient is not None
        assert p.grad is not None
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            p.grad, gradient, rtol=2e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
        # AdamW's first update by hand: both moments are the gradient's own, so it is lr sign(g), after the decay.
        rate, decay = rates.get(name.rpartition(".")[2], (0.01, 0.0))
        moved = start[name] * (1 - rate * decay) - rate * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), moved, rtol=1e-4, atol=1e-6)


def test_the_number_of_right_answers_is_counted_before_the_update() -> None:
    model = quantized().train()
    x, y = batch()
    expected = (copy.deepcopy(model)(x).argmax(1) == y).sum()
    assert train_step(model, optimizer_of(model), x, y, Objective(), 0.0).correct == expected


def test_the_penalty_is_not_computed_at_coefficient_zero() -> None:
    model, calls = quantized().train(), []

    def penalty(_: nn.Module) -> Tensor:
        calls.append(1)
        return torch.ones(())

    x, y = batch()
    optimizer = optimizer_of(model)
    assert train_step(model, optimizer, x, y, Objective(penalty), 0.0).groups == 0
    assert not calls
    assert train_step(model, optimizer, x, y, Objective(penalty), 0.5).groups == 1
    assert len(calls) == 1


def test_every_quantized_weight_is_computed_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = quantized().train(), []
    objective = Objective(coupled_group_lasso(model))
    many = DeadZoneLDZCompander.quantize_many

    def counted(quantizers: Any, weights: Any) -> list[Tensor]:
        calls.append(len(weights))
        return many(quantizers, weights)

    def single(self: DeadZoneLDZCompander, w: Tensor) -> Tensor:
        raise AssertionError("a weight was quantized by itself")

    monkeypatch.setattr(DeadZoneLDZCompander, "quantize_many", staticmethod(counted))
    monkeypatch.setattr(DeadZoneLDZCompander, "forward", single)
    x, y = batch()
    train_step(model, optimizer_of(model), x, y, objective, 0.1)
    assert calls == [6]


def test_squared_logits_by_hand() -> None:
    model = quantized(init_deadzone_logit=2.0, init_bit_logit=-3.0)
    cast(Any, model.layer1)[0].conv1.parametrizations.weight[0].quantizer.logit_dz.data.fill_(5.0)
    # dead zone: five times 2 and once 5 give 45; bits: six times (-3)^2 give 54
    assert squared_logits(model, 0.01, 0.1).item() == pytest.approx(0.01 * 45 + 0.1 * 54)
    assert squared_logits(model, 0.0, 0.0).item() == 0
    assert squared_logits(quantized(init_deadzone_logit=2.0, learnable_bit=False), 1.0, 1.0).item() == pytest.approx(24)
    assert squared_logits(network(), 1.0, 1.0).item() == 0


def test_weights_and_optimizer_state_stay_float32_in_bfloat16() -> None:
    model = quantized().train()
    optimizer = optimizer_of(model)
    x, y = batch()
    losses = train_step(model, optimizer, x, y, Objective(coupled_group_lasso(model), 0.01, 0.01), 0.1, torch.bfloat16)
    assert losses.total.dtype == torch.float32
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float32}
    moments = [t for state in optimizer.state.values() for t in state.values()]
    assert {t.dtype for t in moments} == {torch.float32}


# --- epochs


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path: Any) -> None:
    data = images()

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: range, history: Any) -> None:
        objective = Objective(coupled_group_lasso(model), 0.01, 0.01)
        for epoch in epochs:
            means = EpochMeans()
            settings = {"epoch": epoch, "coefficient": 0.01 * epoch, "lr_lambda": hold_then_linear(0.5), "seed": 3}
            for step in one_epoch(model, optimizer, data, objective=objective, **settings):
                means.add(step)
            record = measure_epoch(model, optimizer, data, means, epoch=epoch, coefficient=0.01 * epoch, seconds=0.0)
            history.append(record)

    from src.training import History

    whole, unbroken = quantized(), History(3)
    whole_optimizer = optimizer_of(whole)
    train(whole, whole_optimizer, range(3), unbroken)

    first, history = quantized(), History(3)
    first_optimizer = optimizer_of(first)
    train(first, first_optimizer, range(1), history)
    folder = RunFolder.open(tmp_path / "run")
    folder.save_progress(first, first_optimizer, history, {"seed": 3})

    second = quantized(seed=99)
    second_optimizer = optimizer_of(second)
    resumed = folder.resume(second, second_optimizer, {"seed": 3}, torch.device("cpu"))
    train(second, second_optimizer, range(1, 3), resumed)

    assert resumed.to_json() == unbroken.to_json()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    for mine, theirs in zip(whole_optimizer.state.values(), second_optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    data = images()

    def losses(**changes: Any) -> list[float]:
        model = network()
        torch.rand(3)  # the global generator has no part in it
        return [step.loss() for step in one_epoch(model, optimizer_of(model), data, **changes)]

    assert losses(epoch=1, seed=5) == losses(epoch=1, seed=5)
    assert losses(epoch=1, seed=5) != losses(epoch=2, seed=5)
    assert losses(epoch=1, seed=5) != losses(epoch=1, seed=6)
    seeds = {training.epoch_seed(seed, epoch) for seed in range(20) for epoch in range(300)}
    assert len(seeds) == 20 * 300


def test_steps_say_where_they_are_and_only_the_weights_rate_moves() -> None:
    model, done = quantized(), []
    optimizer = optimizer_of(model)

    def factor(share: float) -> float:
        done.append(share)
        return 0.5

    steps = one_epoch(model, optimizer, images(70), epoch=1, epochs=2, lr_lambda=factor)
    assert [(s.index, s.steps, s.images) for s in steps] == [(0, 4, 16), (1, 4, 16), (2, 4, 16), (3, 4, 16)]
    assert done == [0.5, 0.625, 0.75, 0.875]
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.02, 0.03]
    assert model.training


def test_means_of_an_epoch_by_hand() -> None:
    means = EpochMeans()
    with pytest.raises(TrainingError, match="no step"):
        means.read()
    for index, values in enumerate(((1.0, 2.0, 3.0, 4.0, 5), (3.0, 4.0, 5.0, 6.0, 3))):
        means.add(Step(index, 2, 8, StepLosses(*(torch.tensor(value) for value in values))))
    assert means.read() == {
        "loss": 2.0, "task_loss": 3.0, "logit_penalty": 4.0, "group_penalty": 5.0, "train_accuracy": 0.5
    }  # fmt: skip


def test_a_parameter_that_is_not_a_number_stops_the_run_and_is_named() -> None:
    model = quantized()
    cast(Any, model.layer2)[0].bn1.weight.data[3] = float("nan")
    with pytest.raises(
        TrainingError, match=r"loss is nan at epoch 3, step 1 .*not finite: weight layer2\.0\.bn1\.weight"
    ):
        # a rate of 0 keeps the update from spreading it
        one_epoch(
            model, torch.optim.SGD([{"name": "weights", "base_lr": 0.0, "params": []}], lr=0.0), images(), epoch=2
        )


def test_a_loss_that_is_infinite_later_is_found_at_once_on_a_cpu() -> None:
    model, calls = quantized(), []

    def penalty(_: nn.Module) -> Tensor:
        calls.append(1)
        return torch.tensor(math.inf if len(calls) >= 3 else 1.0)

    with pytest.raises(
        TrainingError, match=r"loss is inf at epoch 1, step 3 .*none of inputs, weights and .*; lower the"
    ):
        one_epoch(model, optimizer_of(model), images(), objective=Objective(penalty), coefficient=1.0)


def test_a_network_broken_by_the_last_update_gives_no_record() -> None:
    model = quantized()
    model.linear.bias.data.fill_(float("nan"))
    means = EpochMeans()
    means.add(Step(0, 1, 8, StepLosses(*torch.ones(5))))
    with pytest.raises(TrainingError, match=r"test loss is nan after epoch 1; .*linear\.bias"):
        measure_epoch(model, optimizer_of(model), images(), means, epoch=0, coefficient=0.0, seconds=0.0)


def test_learning_rate_shapes_by_hand() -> None:
    held = hold_then_linear(0.7)
    assert [held(share) for share in (0, 0.5, 0.699)] == [1, 1, 1]
    assert [held(share) for share in (0.85, 0.97, 1.0, 1.2)] == pytest.approx([0.5, 0.1, 0, 0])
    assert hold_then_linear(0.0)(0.25) == pytest.approx(0.75)
    assert [cosine_to_zero(share) for share in (0, 1 / 3, 0.5, 2 / 3, 1)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])


# --- evaluation


def test_evaluation_equals_a_plain_loop_and_restores_the_modes() -> None:
    model, data = quantized(), images()
    model.train()
    model.layer2.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    loss, accuracy = evaluate(model, data, batch_size=7)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())

    plain = copy.deepcopy(model).eval()
    mean, std = np.float32(0.5), np.float32(0.25)
    right, total = 0, 0.0
    with torch.no_grad():
        for picture, label in zip(data.test_images.numpy(), data.test_labels.tolist(), strict=True):
            x = torch.from_numpy((picture.astype(np.float32) / 255 - mean) / std)[None]
            scores = plain(x)[0].double().numpy()
            right += int(scores.argmax() == label)
            total += math.log(np.exp(scores - scores[label]).sum())
    assert accuracy == right / 30
    assert loss == pytest.approx(total / 30, rel=1e-5)

    toggle_quantization(model, False)
    assert evaluate(model, data)[0] != pytest.approx(loss, rel=1e-5)
    predicted, again = predict(model, data, batch_size=13)
    assert predicted.shape == (30,)
    assert again == pytest.approx(evaluate(model, data)[0], rel=1e-5)


def test_the_modes_are_restored_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized().train()

    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model, images())
    assert all(module.training for module in model.modules())
    layer = cast(Any, model.layer1)[0].conv1
    assert layer.weight.grad_fn is not None  # no shared weight is left behind


def test_layer_records_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False))
    half = math.atanh(0.5)
    kwargs = {"init_deadzone_logit": half, "init_bit_logit": -half}
    model[0].weight.data = torch.tensor([[0.0, 0.1], [1.0, -1.0], [0.4, 1.0]]).view(3, 2, 1, 1)
    attach_weight_quantizers(model, [], DeadZoneLDZCompander, kwargs)
    # |w| sorted: 0 .1 .4 1 1 1; the 0.99-quantile at position 4.95 is R = 1; d / 2 = R (1 - 0.5) = 0.5, so 0, 0.1 and
    # 0.4 become 0; b = 0.5 (8 - 2) + 2 = 5
    (record,) = layer_records(model)
    assert (record.name, record.bits, record.sparsity, record.dead) == ("0", 5.0, 0.5, (True, False, False))
    assert record.dead_zone == pytest.approx(0.5)
    assert (record.channels, record.dead_channels) == (3, 1)


def test_summary_by_hand() -> None:
    layers = (
        LayerRecord("a", 4.0, 0.1, 0.5, (True, False)),
        LayerRecord("b", 7.0, 0.1, 0.25, (False, False, True, True, True, False, False, False)),
    )
    figures = summary(layers, {"a": 10, "b": 90})
    # zeros: (0.5 * 10 + 0.25 * 90) / 100; dead filters: 4 of 10; bits: (4 + 7) / 2
    expected = {"unstructured_sparsity": 0.275, "structured_sparsity": 0.4, "mean_bits": 5.5}
    assert figures == pytest.approx(expected)


def test_the_record_of_an_epoch_holds_what_was_measured() -> None:
    model, data = quantized(), images()
    optimizer, means = optimizer_of(model), EpochMeans()
    for step in one_epoch(model, optimizer, data, lr_lambda=lambda done: 0.5):
        means.add(step)
    record = measure_epoch(model, optimizer, data, means, epoch=4, coefficient=0.25, seconds=1.5)
    assert (record.epoch, record.coefficient, record.seconds, record.learning_rate) == (5, 0.25, 1.5, 0.005)
    assert (record.test_loss, record.accuracy) == evaluate(model, data)
    weights = [layer.weight.detach() for layer in cast(Any, quantized_layers(model)).values()]
    zeros, count = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert 0 < zeros < count
    assert record.unstructured_sparsity == pytest.approx(zeros / count)
    assert record.loss == pytest.approx(record.task_loss)  # no logits and no penalty in this objective


# --- devices and arithmetic


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(TrainingError, match="'cuda' is not present here: use one of cpu, or auto"):
        pick_device("cuda")
    with pytest.raises(TrainingError, match="'gpu' is unknown: choose one of auto, cpu, cuda, mps"):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device().type == "cuda"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device().type == "mps"


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert pick_precision("fp32", cpu) is torch.float32
    assert pick_precision("bf16", cpu) is torch.bfloat16
    found: dict[str, bool] = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert pick_precision("auto", cpu) is torch.float32
    for capability in ("avx512_bf16", "amx_bf16"):
        found.clear()
        found[capability] = True
        assert pick_precision("auto", cpu) is torch.bfloat16
    assert pick_precision("auto", torch.device("mps")) is torch.float32
    with pytest.raises(TrainingError, match="'fp8' is unknown: choose one of auto, fp32, bf16"):
        pick_precision("fp8", cpu)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_step_on_an_accelerator_equals_one_on_the_cpu(kind: str) -> None:
    present = torch.cuda.is_available() if kind == "cuda" else torch.backends.mps.is_available()
    if not present:
        pytest.skip(f"no {kind} device here")
    device = torch.device(kind)
    model, (x, y) = quantized(), batch()
    other = copy.deepcopy(model).to(device)
    got = []
    for net, images_, labels in ((model, x, y), (other, x.to(device), y.to(device))):
        objective = Objective(coupled_group_lasso(net), 0.01, 0.01)
        got.append(train_step(net.train(), optimizer_of(net), images_, labels, objective, 0.1).total.cpu())
    torch.testing.assert_close(got[0], got[1], rtol=1e-3, atol=1e-3)
    assert F.cross_entropy(other.eval()(x.to(device)), y.to(device)).isfinite()
