"""One step, one epoch, one evaluation, compared with plain implementations and sums done by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments.sparsity import coupled_group_lasso
from src.data import normalize
from src.pruning import channel_groups
from src.quantizer import DeadZoneLDZCompander
from src.training import (
    EpochMeans,
    LayerRecord,
    Objective,
    Step,
    StepLosses,
    TrainingError,
    cosine_to_zero,
    epoch_seed,
    evaluate,
    hold_then_linear,
    layer_records,
    make_optimizer,
    measure_epoch,
    parameter_groups,
    predict,
    recalibrated_accuracy,
    squared_logits,
    summarize_layers,
    train_epoch,
    train_step,
)
from tests.training.small import RATES, batch, images, network, optimizer_of, quantized
from utils_quantization import attach_weight_quantizers, quantized_layers, toggle_quantization


def one_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 64, **changes: Any) -> list[Step]:
    settings = {"objective": Objective(), "epoch": 0, "lr_lambda": lambda progress: 1.0, "coefficient": 0.0, **changes}
    return list(train_epoch(model, optimizer, images(count), epochs=2, batch_size=16, **settings))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_is_trained_and_tested_in_its_own_type(half: torch.dtype) -> None:
    model = network().to(half)
    attach_weight_quantizers(model, ["conv1", "linear"], DeadZoneLDZCompander, {"init_deadzone_logit": 1.0})
    optimizer, penalty = optimizer_of(model), coupled_group_lasso(model)
    before = penalty(model).item()
    objective = Objective(penalty, lambda_dz=0.1, lambda_bit=0.1)
    steps = one_epoch(model, optimizer, objective=objective, coefficient=1e-3)
    assert all(math.isfinite(step.loss()) for step in steps)
    assert {p.dtype for name, p in model.named_parameters() if "logit" not in name} == {half}
    assert all(layer.weight.dtype == half for layer in quantized_layers(model).values())
    assert penalty(model).item() == pytest.approx(before, rel=0.3)
    assert 0 <= evaluate(model, images())[1] <= 1
    assert 0 <= recalibrated_accuracy(model, images()) <= 1


def test_steps_of_float16_are_at_most_the_learning_rate() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    weight.grad = torch.tensor([1e-4, 1e-3], dtype=torch.float16)  # times 1e-3 their squares are 0: AdamW forgets them
    optimizer = make_optimizer([{"name": "weights", "lr": 1e-3, "weight_decay": 0.0, "params": [weight]}])
    for _ in range(300):
        optimizer.step()
    assert ((weight < 0) & (weight > -0.31)).all()  # with equal gradients, each step of AdamW is the learning rate


def test_every_trainable_parameter_is_in_exactly_one_group_with_its_own_rate_and_decay() -> None:
    model = quantized()
    model.bn1.bias.requires_grad_(False)
    groups = parameter_groups(model, **RATES, dz_decay=0.1, bit_decay=0.2)
    assert [(g["name"], g["lr"], g["base_lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("weights", 0.01, 0.01, 0.0, 8 + 1 + 13),  # 8 weights, 1 bias, 7 BatchNorms with scale and shift less one
        ("logit_dz", 0.02, 0.02, 0.1, 6),
        ("logit_bit", 0.03, 0.03, 0.2, 6),
    ]
    members = [p for group in groups for p in group["params"]]
    assert sorted(map(id, members)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for group in groups[1:]:
        logits = [p for name, p in model.named_parameters() if name.endswith(f".{group['name']}")]
        assert list(map(id, group["params"])) == list(map(id, logits))
    frozen = quantized(learnable_bit=False)
    assert [g["name"] for g in parameter_groups(frozen, **RATES)] == ["weights", "logit_dz"]


def plain_loss(model: nn.Module, x: Tensor, y: Tensor, dz: float, bit: float, coefficient: float) -> dict[str, Tensor]:
    """The objective without sharing, in the order of the equations, one channel and one logit at a time."""
    scores = model(x)
    task = -torch.log_softmax(scores, dim=1)[torch.arange(len(y)), y].mean()
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
    total = task + logits + coefficient * groups
    return {"task": task, "logits": logits, "groups": groups, "total": total, "correct": (scores.argmax(1) == y).sum()}


def test_a_step_equals_a_plain_implementation_without_sharing() -> None:
    model = quantized()
    reference = copy.deepcopy(model)
    x, y = batch()
    optimizer = optimizer_of(model, dz_decay=0.5, bit_decay=0.25)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    expected = plain_loss(reference.train(), x, y, 0.02, 0.03, 0.1)
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
        torch.testing.assert_close(p.grad, gradient, rtol=2e-3, atol=2e-5, msg=lambda text, name=name: f"{name} {text}")
        # AdamW's first update by hand: both moments are the gradient's own, so it is lr sign(g), after the decay.
        rate, decay = rates.get(name.rpartition(".")[2], (0.01, 0.0))
        moved = start[name] * (1 - rate * decay) - rate * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), moved, rtol=1e-4, atol=1e-6)


def test_the_penalty_is_not_computed_at_coefficient_zero() -> None:
    model, calls = quantized().train(), []
    objective = Objective(lambda _: torch.ones(()) * len(calls.append(1) or calls))
    found = [train_step(model, optimizer_of(model), *batch(), objective, weight).groups for weight in (0.0, 0.5)]
    assert (found, len(calls)) == ([0, 1], 1)


def test_every_quantized_weight_is_computed_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, many = quantized().train(), [], DeadZoneLDZCompander.quantize_many
    objective = Objective(coupled_group_lasso(model))
    counted = staticmethod(lambda quantizers, weights: calls.append(len(weights)) or many(quantizers, weights))
    monkeypatch.setattr(DeadZoneLDZCompander, "quantize_many", counted)
    monkeypatch.setattr(DeadZoneLDZCompander, "forward", None)  # none is quantized by itself
    train_step(model, optimizer_of(model), *batch(), objective, 0.1)
    assert calls == [6]


def test_squared_logits_by_hand() -> None:
    model = quantized(init_deadzone_logit=2.0, init_bit_logit=-3.0)
    cast(Any, model.layer1)[0].conv1.parametrizations.weight[0].quantizer.logit_dz.data.fill_(5.0)
    # dead zone: five times 2 and once 5 give 45; bits: six times (-3)^2 give 54
    assert squared_logits(model, 0.01, 0.1).item() == pytest.approx(0.01 * 45 + 0.1 * 54)
    assert squared_logits(model, 0.0, 0.0).item() == 0
    assert squared_logits(quantized(init_deadzone_logit=2.0, learnable_bit=False), 1.0, 1.0).item() == pytest.approx(24)
    assert squared_logits(network(), 1.0, 1.0).item() == 0


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def losses(**changes: Any) -> list[float]:
        model = network()
        torch.rand(3)  # the global generator has no part in it
        return [step.loss() for step in one_epoch(model, optimizer_of(model), **changes)]

    assert losses(epoch=1, seed=5) == losses(epoch=1, seed=5)
    assert losses(epoch=1, seed=5) != losses(epoch=2, seed=5)
    assert losses(epoch=1, seed=5) != losses(epoch=1, seed=6)
    assert len({epoch_seed(seed, epoch) for seed in range(20) for epoch in range(300)}) == 20 * 300


def test_steps_say_where_they_are_and_only_the_weights_rate_moves() -> None:
    model, progress = quantized().eval(), []
    optimizer = optimizer_of(model)
    steps = one_epoch(model, optimizer, 70, epoch=1, lr_lambda=lambda share: progress.append(share) or 0.5)
    assert [(s.index, s.steps, s.images) for s in steps] == [(0, 4, 16), (1, 4, 16), (2, 4, 16), (3, 4, 16)]
    assert progress == [0.5, 0.625, 0.75, 0.875]
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.02, 0.03]
    assert model.training


def test_means_of_an_epoch_by_hand() -> None:
    means = EpochMeans()
    for index, values in enumerate(((1.0, 2.0, 3.0, 4.0, 5), (3.0, 4.0, 5.0, 6.0, 3))):
        means.add(Step(index, 2, 8, StepLosses(*(torch.tensor(value) for value in values))))
    expected = {"loss": 2.0, "task_loss": 3.0, "logit_penalty": 4.0, "group_penalty": 5.0, "train_accuracy": 0.5}
    assert means.read() == expected


def test_learning_rate_shapes_by_hand() -> None:
    held = hold_then_linear(0.7)
    assert [held(share) for share in (0, 0.5, 0.699)] == [1, 1, 1]
    assert [held(share) for share in (0.85, 0.97, 1.0, 1.2)] == pytest.approx([0.5, 0.1, 0, 0])
    assert hold_then_linear(0.0)(0.25) == pytest.approx(0.75)
    assert [cosine_to_zero(share) for share in (0, 1 / 3, 0.5, 2 / 3, 1)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_evaluation_equals_a_plain_loop_and_restores_the_modes() -> None:
    model, data = quantized(), images()
    model.train()
    model.layer2.eval()
    modes = [module.training for module in model.modules()]
    buffers = [b.clone() for b in model.buffers()]
    loss, accuracy = evaluate(model, data)
    assert [module.training for module in model.modules()] == modes
    assert all(map(torch.equal, model.buffers(), buffers))

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
    predicted, unquantized = predict(model, data)
    assert predicted.shape == (30,)
    assert unquantized != pytest.approx(loss, rel=1e-5)


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


def test_summary_by_hand() -> None:
    layers = (
        LayerRecord("a", 4.0, 0.1, 0.5, (True, False)),
        LayerRecord("b", 7.0, 0.1, 0.25, (False, False, True, True, True, False, False, False)),
    )
    # zeros: (0.5 * 10 + 0.25 * 90) / 100; dead filters: 4 of 10; bits: (4 + 7) / 2
    expected = {"unstructured_sparsity": 0.275, "structured_sparsity": 0.4, "mean_bits": 5.5}
    assert summarize_layers(layers, {"a": 10, "b": 90}) == pytest.approx(expected)


def test_the_record_of_an_epoch_holds_what_was_measured() -> None:
    model, means = quantized(), EpochMeans()
    optimizer = optimizer_of(model)
    for step in one_epoch(model, optimizer, lr_lambda=lambda progress: 0.5):
        means.add(step)
    record = measure_epoch(model, optimizer, images(), means, epoch=4, coefficient=0.25, seconds=1.5)
    assert (record.epoch, record.coefficient, record.seconds, record.learning_rate) == (5, 0.25, 1.5, 0.005)
    assert (record.test_loss, record.accuracy) == evaluate(model, images())
    weights = [layer.weight.detach() for layer in cast(Any, quantized_layers(model)).values()]
    zeros, count = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert 0 < zeros < count
    assert record.unstructured_sparsity == pytest.approx(zeros / count)
    assert record.loss == pytest.approx(record.task_loss)  # no logits and no penalty in this objective


def nan_weight(model: nn.Module) -> Objective:
    model.get_submodule("layer2.0.bn1").get_parameter("weight").data[3] = math.nan
    return Objective()


def test_recalibration_measures_the_statistics_of_the_training_images_and_touches_nothing() -> None:
    model, data = quantized(), images()
    by_hand, seen = copy.deepcopy(model).train(), {}
    norms = [module for module in by_hand.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0].detach()}))
    by_hand(normalize(data.train_images, data.mean, data.std))
    for norm in norms:  # N H W values a channel
        cast(Tensor, norm.running_mean).copy_(seen[norm].mean((0, 2, 3)))
        cast(Tensor, norm.running_var).copy_(seen[norm].var((0, 2, 3)))
    data = replace(data, test_labels=predict(by_hand, data)[0])  # right is what this network says
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            cast(Tensor, module.running_mean).copy_(torch.linspace(-9, 9, module.num_features))
    before, random = copy.deepcopy(model.train().state_dict()), torch.get_rng_state()
    assert evaluate(model, data)[1] < 0.7
    assert recalibrated_accuracy(model, data) == 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def infinite_gradient(model: nn.Module) -> Objective:
    scale = model.get_submodule("layer2.0.bn1").get_parameter("weight")
    return Objective(lambda _: (scale[0] - scale[0].detach()).sqrt())  # 0, with the derivative 1 / 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan_weight, r"loss is nan at epoch 3, step 1 \(loss nan: .*: linear\.bias; lower the learning rate"),
        (infinite_gradient, r"a gradient is not finite at epoch 3, step 1 .*: layer2\.0\.bn1\.weight; lower"),
        (
            lambda _: Objective(lambda _: torch.tensor(math.inf)),
            r"loss is inf at epoch 3, step 1 .*groups inf.*: none;",
        ),
    ],
)
def test_a_step_that_is_not_finite_ends_the_training(spoil: Callable[[nn.Module], Objective], message: str) -> None:
    model = quantized()
    objective = spoil(model)
    with pytest.raises(TrainingError, match=message):
        one_epoch(model, optimizer_of(model), objective=objective, epoch=2, coefficient=1.0)


def test_a_network_broken_by_the_last_update_gives_no_record() -> None:
    model, means = quantized(), EpochMeans()
    cast(Any, model.linear).bias.data.fill_(math.nan)
    with pytest.raises(TrainingError, match="test loss is nan after epoch 1; lower the learning rate"):
        measure_epoch(model, optimizer_of(model), images(), means, epoch=0, coefficient=0.0, seconds=0.0)
