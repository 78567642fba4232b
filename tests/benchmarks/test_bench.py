"""The benchmark: the slow pipeline computes the same thing, and what is written says so. No time is judged here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments import bench, pipeline
from experiments.pipeline import DEBUG, timing
from experiments.sparsity import coupled_group_lasso
from resnet import resnet20
from src import training
from src.data import normalize
from src.quantizer import DeadZoneLDZCompander
from src.training import Objective
from utils_quantization import attach_weight_quantizers

CPU = torch.device("cpu")
TINY = bench.Setting(batch_size=8, images=16, device="cpu", precision="fp32")


def resnet(quantizer: type[nn.Module]) -> nn.Module:
    """Wide dead zones and few bits, so that zeros and clipping take part."""
    torch.manual_seed(0)
    model = resnet20()
    kwargs = {"init_deadzone_logit": 1.0, "init_bit_logit": -0.6}
    assert len(attach_weight_quantizers(model, DEBUG.exclude_layers, quantizer, kwargs)) == 18
    return model.train()


def test_the_naive_pipeline_computes_what_the_full_one_does() -> None:
    data = bench.synthetic_data(8, CPU)
    x, y = normalize(data.train_images, data.mean, data.std), data.train_labels
    full, naive = resnet(DeadZoneLDZCompander), resnet(bench.NaiveQuantizer)
    rates = (
        training.parameter_groups(full, **DEBUG.group_kwargs),
        training.parameter_groups(naive, **DEBUG.group_kwargs),
    )
    got = training.train_step(
        full, training.make_optimizer(rates[0]), x, y, Objective(coupled_group_lasso(full), 0.01, 0.02), 0.005
    )
    parts = bench.group_parts(naive)
    objective = Objective(lambda model: bench.naive_penalty(model, parts), 0.01, 0.02)
    loss = bench.naive_step(naive, torch.optim.AdamW(rates[1]), x.contiguous(), y, objective, 0.005)

    assert got.groups > 0
    assert loss == pytest.approx(got.total.item(), rel=1e-5)
    theirs = dict(full.named_parameters())
    for name, parameter in naive.named_parameters():
        ours, other = parameter.grad, theirs[name].grad
        assert ours is not None
        assert other is not None
        assert other.abs().max() > 0, name
        assert (ours - other).norm() <= 1e-2 * other.norm() + 1e-6, name


def test_the_naive_quantizer_equals_the_fast_one() -> None:
    weight = torch.randn(500, generator=torch.Generator().manual_seed(0))
    for dz, bit in ((3.0, 3.0), (0.7, -0.3), (-1.2, 0.5)):
        fast, slow = (
            kind(init_deadzone_logit=dz, init_bit_logit=bit) for kind in (DeadZoneLDZCompander, bench.NaiveQuantizer)
        )
        torch.testing.assert_close(slow(weight), fast(weight), rtol=1e-5, atol=1e-6)
        assert torch.equal(slow(weight) == 0, fast(weight) == 0)


def test_every_removable_channel_of_resnet20_has_its_parts() -> None:
    parts = bench.group_parts(resnet20())
    # 3 blocks of 16, 32 and 64 inner channels, and the 64 of the residual stream that the shortcuts tie together
    assert len(parts) == 3 * (16 + 32 + 64) + 64
    assert all(len(set(group)) == len(group) for group in parts)
    inner = [group for group in parts if group[0][0] == "layer1.0.conv1"]
    assert inner[0] == [
        ("layer1.0.conv1", "weight", 0, 0),
        ("layer1.0.bn1", "weight", 0, 0),
        ("layer1.0.bn1", "bias", 0, 0),
        ("layer1.0.conv2", "weight", 1, 0),
    ]


def test_image_by_image_augmentation_normalises_like_the_batched_one() -> None:
    data = bench.synthetic_data(12, CPU)
    plain = normalize(data.train_images, data.mean, data.std)
    (batch,) = list(bench.naive_loader(data, 12, 0, False))
    order = [int((plain == image).flatten(1).float().mean(1).argmax()) for image in batch[0]]
    assert sorted(order) == list(range(12))
    torch.testing.assert_close(batch[0], plain[order].contiguous())
    assert torch.equal(batch[1], data.train_labels[order])

    torch.manual_seed(0)
    moved = next(iter(bench.naive_loader(data, 12, 4, True)))[0]
    black = [(0 - m) / s for m, s in zip(data.mean, data.std, strict=True)]
    borders = [(moved[:, c, :, 0] - black[c]).abs().amax(1) < 1e-5 for c in range(3)]
    assert torch.stack(borders).all(0).any()  # a crop that reached into the padding
    assert not torch.equal(moved.sort(0).values, plain.sort(0).values)


def test_the_full_variant_trains_the_run_that_the_script_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []
    real = training.train_step

    def spy(
        model: Any, optimizer: Any, images: Any, labels: Any, objective: Any, coefficient: float, *rest: Any
    ) -> Any:
        seen.append((len(labels), coefficient))
        return real(model, optimizer, images, labels, objective, coefficient, *rest)

    monkeypatch.setattr("src.training.epoch.train_step", spy)
    take = bench.full(TINY)
    for _ in range(3):  # two steps are one epoch here
        take()
    assert seen == [(8, DEBUG.peak)] * 3
    run = pipeline.build_run(replace(DEBUG, device="cpu"), bench.synthetic_data(8, CPU))
    assert run.objective.penalty is not None
    assert len(run.attached) == 18


def check_spread(figures: dict[str, Any], rounds: int) -> None:
    assert set(figures) == {"median", "low", "high", "samples"}
    assert len(figures["samples"]) == rounds
    assert 0 < min(figures["samples"]) <= figures["low"] <= figures["median"] <= figures["high"]


def test_the_figures_that_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {
        name: {"before_bytes": 1, "peak_bytes": 11 + i, "step_bytes": 10 + i} for i, name in enumerate(bench.VARIANTS)
    }
    monkeypatch.setattr(bench, "_memory_of", lambda name, setting: measured[name])
    threads = torch.get_num_threads()
    target = tmp_path / "new" / "bench.json"
    words = ["--batch-size", "8", "--images", "16", "--rounds", "1", "--threads", "1", "--device", "cpu"]
    try:
        assert bench.main(["training", *words, "--json", str(target)]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(target.read_text())
    assert (result["benchmark"], result["network"], result["batch_size"], result["rounds"]) == (
        "training",
        "resnet20",
        8,
        1,
    )
    assert result["machine"].keys() >= {"device", "device_name", "precision", "threads", "system", "cores"}
    assert (result["machine"]["threads"], result["machine"]["device"]) == (1, "cpu")
    assert result["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert list(result["variants"]) == ["plain_float32", "plain_fast", "full", "naive"]
    for name, variant in result["variants"].items():
        check_spread(variant["seconds_per_step"], 1)
        assert variant["images_per_second"] == pytest.approx(8 / variant["seconds_per_step"]["median"])
        assert variant["memory"] == measured[name]
    seconds = {name: variant["seconds_per_step"]["median"] for name, variant in result["variants"].items()}
    ratios = result["ratios"]
    assert ratios.pop("peak_memory_full_over_plain") == pytest.approx(12 / 11)
    pairs = {
        "full_over_plain": ("full", "plain_fast"),
        "naive_over_full": ("naive", "full"),
        "plain_float32_over_fast": ("plain_float32", "plain_fast"),
    }
    assert set(ratios) == set(pairs)
    for name, (over, under) in pairs.items():
        check_spread(ratios[name], 1)
        assert ratios[name]["median"] == pytest.approx(seconds[over] / seconds[under])
    assert result["limits"] == {"full_over_plain": 1.15, "peak_memory_full_over_plain": 1.2}

    out = capsys.readouterr().out
    for words_ in (
        "batch 8",
        "naive pipeline, float32",
        "full over plain",
        "peak memory full over plain",
        "at most 1.15",
    ):
        assert words_ in out


def test_turns_rotate_and_every_variant_has_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    takes = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = bench.time_in_turns(takes, 3, CPU)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab"


def test_the_spread_by_hand() -> None:
    assert timing.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "median": 3.0, "low": 2.0, "high": 4.0, "samples": [4.0, 1.0, 2.0, 3.0, 5.0]
    }  # fmt: skip


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    found = bench._memory_of("plain_fast", TINY)
    assert found["step_bytes"] == found["peak_bytes"] - found["before_bytes"]
    # the activations that backward needs: 8 images, 19 convolutions and their BatchNorms, at least 4 bytes each
    least = 8 * 2 * 4 * (7 * 16 * 32 * 32 + 6 * 32 * 16 * 16 + 6 * 64 * 8 * 8)
    assert least / 2 < found["step_bytes"] < 2**30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "unknown benchmark 'speed': choose one of training"),
        (["training", "--batch-size", "1"], "'1': need a whole number from 2 on"),
        (["--rounds", "0"], "'0': need a whole number from 1 on"),
        (["--rounds", "many"], "'many': need a whole number from 1 on"),
        (["--threads", "-2"], "need a whole number from 1 on"),
        (["--device", "gpu"], "device 'gpu' is unknown"),
        (["--precision", "fp8"], "precision 'fp8' is unknown"),
        (["--json", "."], "'.' is a folder; name a file in it"),
        (["--json", __file__ + "/x.json"], "is a file"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = bench.main([*arguments])
    except SystemExit as stopped:  # argparse
        status = int(str(stopped.code))
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err.splitlines()[-1]
    assert captured.out == ""


def test_every_limit_has_its_ratio() -> None:
    assert set(bench.LIMITS) <= {*bench.RATIOS, "peak_memory_full_over_plain"}
