"""A budget: what is asked for, how the coefficient follows the cost, which channels are chosen, and a resumed run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments import pipeline
from experiments.pipeline import BudgetControl, ConfigError, RunConfig, configure
from experiments.pipeline.config import Budget
from experiments.sparsity import group_norms
from resnet import BasicBlock, ResNet, resnet20
from src.pruning import channel_groups, compact
from src.training import EpochRecord, History
from tests.histories import make_history
from utils_quantization import quantization


@pytest.mark.parametrize(
    ("text", "kind", "share"),
    [("bops 3%", "bops", 0.03), ("macs 0.5", "macs", 0.5), ("bytes 20x", "bytes", 0.05), (" macs  60 % ", "macs", 0.6)],
)
def test_a_budget_is_a_kind_and_a_share(text: str, kind: str, share: float) -> None:
    budget = Budget.parse(text)
    assert (budget.kind, budget.share) == (kind, pytest.approx(share))
    assert configure("debug", target=text).budget == budget


@pytest.mark.parametrize("text", ["bops 150%", "macs 1", "bytes 1x", "bytes 0x", "macs -3%", "size 3%", "macs", "3%"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"need one of bops, macs, bytes, and a share .* below 1, such as 'bops 3%'"):
        configure("debug", target=text)


@pytest.mark.parametrize("changes", [{"peak": 0.0}, {"regularization": "decoupled"}])
def test_a_budget_needs_a_penalty_to_move(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="met by moving the penalty's coefficient; need a peak above 0"):
        configure("debug", target="macs 50%", **changes)


def test_a_budget_below_the_full_precision_layers_is_refused() -> None:
    # stem 3*16*9*1024 = 442,368 and linear 640 of 40,551,040 MACs, all at 32 bits: 1.0925 %
    model = resnet20()
    pipeline.attach(configure("debug"), model)
    with pytest.raises(ConfigError, match=r"conv1, linear: 1\.09%.*with 8 bits they cost 0\.27%"):
        BudgetControl(configure("debug", target="bops 1%"), model, resnet20())
    assert BudgetControl(configure("debug", target="bops 1.2%"), model, resnet20())


def history_of(costs: list[float], epochs: int = 20) -> History:
    """A history whose records have these costs."""
    records = make_history(len(costs), epochs).records
    return History(epochs, [replace(record, cost=cost) for record, cost in zip(records, costs, strict=True)])


def control(target: str) -> BudgetControl:
    config = configure("debug", target=target, delay=5, epochs=20, peak=0.01)
    model = ResNet(BasicBlock, [1, 1, 1])
    pipeline.attach(config, model)
    return BudgetControl(config, model, ResNet(BasicBlock, [1, 1, 1]))


def test_the_coefficient_follows_the_cost() -> None:
    # Control begins after epoch 5 with a cost of 0.25; the aim is 0.96 * 0.1 = 0.096. The path takes three quarters of
    # 15 epochs, 45 / 4. The middle of epoch 6 is t = 0.5 * 4 / 45 = 2 / 45, f = 4 (2 / 45) (43 / 45); that of epoch 7
    # is t = 2 / 15, f = 4 (2 / 15) (13 / 15). After epoch 6 t = 4 / 45: log(0.25 / 0.096) (3 t^2 - 2 t^3) were to go.
    bops = control("bops 10%")
    assert bops.coefficient(history_of([0.25] * 4)) == 0
    assert bops.coefficient(history_of([0.25] * 5)) == pytest.approx(0.01 * 344 / 2025)
    error = math.log(0.25 / 0.096) * (48 / 2025 - 128 / 91125)
    assert bops.coefficient(history_of([0.25] * 6)) == pytest.approx(0.01 * 104 / 225 * math.exp(6.3 * error))
    assert bops.coefficient(history_of([0.25] * 19)) == pytest.approx(0.3), "at most 30 times the peak"
    # Trimming: log(0.08 / 0.096) / 0.25 = -0.729; log(0.1 / 0.096) / 0.25 = 0.1633
    assert bops.coefficient(history_of([0.25] * 5 + [0.08])) == pytest.approx(-0.00729, abs=5e-6)
    assert bops.coefficient(history_of([0.25] * 5 + [0.05])) == -0.01, "no more than the peak"
    assert bops.coefficient(history_of([0.25] * 5 + [0.1])) == pytest.approx(0.001633, abs=5e-7)
    # log(0.099 / 0.096) / 0.25 = 0.1231, after the path; above the budget twice log(0.105 / 0.096) / 0.25 = 0.3584
    assert bops.coefficient(history_of([0.25] * 16 + [0.099])) == pytest.approx(0.001231, abs=5e-7)
    assert bops.coefficient(history_of([0.25] * 16 + [0.105])) == pytest.approx(0.007169, abs=5e-7)
    assert bops.coefficient(history_of([0.25] * 16 + [0.12])) == 0.01, "no more than the peak"
    assert bops.coefficient(history_of([0.25] * 15 + [0.12])) > 0.01
    macs = control("macs 10%")
    assert macs.coefficient(history_of([1.0] * 5 + [0.095])) == 0.01, "what is chosen stays penalised"
    # Its path ends after three quarters of 15 epochs: after 12 the error is all of log(1 / 0.096), its sum far more
    assert macs.coefficient(history_of([1.0] * 17)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("cost", "epochs", "lasso", "dead_zones", "bits"),
    [
        (0.25, 6, 1, 6, 6),
        (0.105, 6, 1, 6, 0),  # 0.105 * 7 / 8 < 0.096: one bit less in every layer is too small
        (0.1, 17, 0, 2, 0),  # log(0.1 / 0.096) / 0.25 = 16 % of six layers, the first and the last
        (0.08, 6, 0, 5, 0),  # log(0.08 / 0.096) / 0.25 = 73 %: all but the fourth, 3 * 0.618 % 1 = 0.854
    ],
)
def test_what_the_penalty_acts_on(cost: float, epochs: int, lasso: int, dead_zones: int, bits: int) -> None:
    bops = control("bops 10%")
    model = ResNet(BasicBlock, [1, 1, 1])
    pipeline.attach(configure("debug"), model)
    history = history_of([0.25] * 5 + [cost] * (epochs - 5))
    history.records[-1] = replace(history.last, mean_bits=8.0)
    bops.apply(history)
    assert bops.objective.penalty is not None
    # Every logit starts at 3, so its square, weighted by 0.01 / 0.01, is 9
    norms = group_norms(channel_groups(model))(model).sum().item()
    share = 1.0 if lasso else abs(math.log(cost / 0.096)) / 0.25
    expected = lasso * norms + 9 * dead_zones / share + 9 * bits
    assert bops.objective.penalty(model).item() == pytest.approx(expected, rel=1e-5)


def test_the_smallest_groups_that_do_not_fit_are_chosen() -> None:
    macs = control("macs 60%")
    torch.manual_seed(1)
    model = ResNet(BasicBlock, [1, 1, 1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(len(parameter)).view(-1, *[1] * (parameter.dim() - 1)) + 0.1)
    chosen = macs.choose(model)
    groups = channel_groups(model)
    norms = {}
    for group in range(len(groups)):
        parts = [
            getattr(model.get_submodule(module), name).index_select(dim, torch.from_numpy(indices)).flatten()
            for module, name, dim, indices in groups.slices(group)
        ]
        norms[group] = torch.cat(parts).norm().item()
    for maker in {name.partition("[")[0] for name in groups.names}:
        same = [group for group, name in enumerate(groups.names) if name.startswith(f"{maker}[")]
        mean = sum(norms[group] for group in same) / len(same)
        norms |= {group: norms[group] / mean for group in same}
    assert set(chosen) == set(sorted(norms, key=lambda group: norms[group])[: len(chosen)])

    def share_without(dead: tuple[int, ...]) -> float:
        """MACs that torch counts in the network that is really left."""
        smaller = ResNet(BasicBlock, [1, 1, 1]).eval()
        smaller.load_state_dict(model.state_dict())
        with torch.no_grad():
            for group in dead:
                for module, name, dim, indices in groups.slices(group):
                    getattr(smaller.get_submodule(module), name).index_fill_(dim, torch.from_numpy(indices), 0)
        counts = []
        for network in (compact(smaller), model):
            with FlopCounterMode(display=False) as counter:
                network(torch.zeros(1, 3, 32, 32))
            counts.append(counter.get_total_flops())
        return counts[0] / counts[1]

    largest = max(chosen, key=lambda group: norms[group])
    assert share_without(chosen) <= 0.96 * 0.6 < share_without(tuple(set(chosen) - {largest}))


def test_a_network_above_the_budget_when_the_path_has_ended_loses_the_chosen_channels() -> None:
    """The path of 20 epochs ends 0.75 * 19 + 1 = 15.25 epochs in. At 16 a network of 100 % is brought to the aim."""
    config = configure("debug", target="macs 60%", delay=1)
    torch.manual_seed(1)
    model = resnet20()
    pipeline.attach(config, model)
    macs = BudgetControl(config, model, resnet20())
    chosen = macs.choose(model)
    for epochs, before, after in ((15, 1.0, 1.0), (16, 0.6, 1.0), (16, 0.601, 0.57)):
        history = history_of([1.0] * (epochs - 1) + [before])
        history.records[-1] = replace(history.last, penalised=chosen)
        macs.enforce(model, history)
        assert macs.cost(model) == pytest.approx(after, abs=0.006)
    assert macs.cost(model) <= 0.576
    with quantization(model, False), torch.no_grad():
        smaller = compact(model.eval())
        images = torch.randn(4, 3, 32, 32)
        assert torch.allclose(smaller(images), model(images), atol=1e-4)


def small(target: str) -> RunConfig:
    return configure(
        "smoke", target=target, epochs=3, delay=1, limit=60, batch_size=30, device="cpu", peak=0.05, seed=3
    )


@pytest.mark.parametrize("target", ["macs 50%", "bops 10%", "bytes 10x"])
def test_a_run_records_its_cost_and_a_resumed_one_is_the_same(target: str, tmp_path: Path) -> None:
    config, data = pipeline.prepare_data(small(target))

    def train(run: pipeline.Run, folder: str, stop_after: int = 99, resume: bool = False) -> pipeline.Run:
        loop = pipeline.TrainingLoop.open(run, tmp_path / folder, resume=resume)
        steps = 0
        with loop:
            for _ in loop.epochs():
                for _ in loop.steps():
                    steps += 1
                    if steps == stop_after:
                        loop.save()
                        return run
                loop.finish_epoch()
        return run

    whole = train(pipeline.build_run(config, data), "whole")
    train(pipeline.build_run(config, data), "stopped", stop_after=5)  # in the middle of the third epoch
    resumed = train(pipeline.build_run(config, data), "stopped", resume=True)
    assert [replaced(each) for each in resumed.history] == [replaced(each) for each in whole.history]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name

    last = whole.history.last
    assert last.cost is not None
    assert 0 < last.cost <= 1
    assert bool(last.penalised) == target.startswith("macs")
    assert whole.history[2].coefficient > 0 == whole.history[0].coefficient
    assert whole.history.csv_text().splitlines()[0].count("cost") == 1
    assert whole.control is not None
    whole.model.eval()
    if target.startswith("bytes"):
        assert last.cost == pytest.approx(1 / pipeline.packed_ratio(whole.model))
    if target.startswith("bops"):
        with quantization(whole.model, enabled=True):
            assert last.cost == pytest.approx(relative_bops(whole), rel=1e-12)


def replaced(one: EpochRecord) -> list[object]:
    return [value for name, value in vars(one).items() if name != "seconds"]


def relative_bops(run: pipeline.Run) -> float:
    """Non-zero weights times output pixels times bits, over 32 bits for all, with the pixels of the three stages."""
    pixels = {"conv1": 1024, "layer1": 1024, "layer2": 256, "layer3": 64, "linear": 1}
    used = dense = 0.0
    bits = {layer.name: layer.bits for layer in run.history.last.layers}
    for name, module in run.model.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            weight = module.weight.detach().numpy()
            used += np.count_nonzero(weight) * pixels[name.split(".")[0]] * bits.get(name, 32.0)
            dense += weight.size * pixels[name.split(".")[0]] * 32
    return used / dense
