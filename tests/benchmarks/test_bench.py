"""The benchmark: what is timed is what it should be, and what is written says so. No time is judged here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import bench
from experiments.benchmarks import training as variants
from experiments.pipeline import DEBUG, spread, time_in_turns
from src import training

CPU = torch.device("cpu")
TINY = replace(DEBUG, batch_size=8, device="cpu", precision="fp32")


def test_the_full_variant_trains_with_the_penalty_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool, float]] = []
    real = training.train_step

    def spy(model: Any, optimizer: Any, images: Any, labels: Any, objective: Any, coefficient: Any, *rest: Any) -> Any:
        seen.append((len(labels), objective.penalty is not None, coefficient))
        return real(model, optimizer, images, labels, objective, coefficient, *rest)

    monkeypatch.setattr("src.training.epoch.train_step", spy)
    step_fn = variants.full(TINY, variants.synthetic_data(16), CPU)
    for _ in range(3):  # two steps are one epoch here
        step_fn()
    assert seen == [(8, True, DEBUG.peak)] * 3


def check_spread(figures: dict[str, Any]) -> float:
    assert set(figures) == {"median", "low", "high", "samples"}
    assert 0 < min(figures["samples"]) <= figures["low"] <= figures["median"] <= figures["high"]
    return figures["median"]


def test_the_figures_that_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {name: {"step_bytes": 10 + i} for i, name in enumerate(variants.VARIANTS)}
    monkeypatch.setattr(variants, "memory_of", lambda name, config: memory[name])
    threads, target = torch.get_num_threads(), tmp_path / "new" / "bench.json"
    words = ["--batch-size", "8", "--images", "16", "--rounds", "1", "--threads", "1", "--device", "cpu"]
    try:
        assert bench.main(["training", *words, "--json", str(target)]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(target.read_text())
    expected = {"benchmark": "training", "network": "resnet20", "batch_size": 8, "images": 16, "rounds": 1}
    assert result.items() >= expected.items()
    assert result["machine"].keys() >= {"device_name", "precision", "system", "cores"}
    assert (result["machine"]["threads"], result["machine"]["device"]) == (1, "cpu")
    assert result["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert list(result["variants"]) == ["plain_float32", "plain_fast", "full"]
    seconds = {name: check_spread(variant["seconds_per_step"]) for name, variant in result["variants"].items()}
    for name, variant in result["variants"].items():
        assert variant["images_per_second"] == pytest.approx(8 / seconds[name])
        assert variant["memory"] == memory[name]
    ratios = result["ratios"]
    assert ratios.pop("peak_memory_full_over_plain") == pytest.approx(12 / 11)
    assert {name: check_spread(figures) for name, figures in ratios.items()} == {
        "full_over_plain": pytest.approx(seconds["full"] / seconds["plain_fast"]),
        "plain_float32_over_fast": pytest.approx(seconds["plain_float32"] / seconds["plain_fast"]),
    }
    assert result["limits"] == {"full_over_plain": 1.15, "peak_memory_full_over_plain": 1.2}
    out = capsys.readouterr().out
    for text in ("batch 8", "full pipeline, fastest mode", "full over plain", "peak memory full", "at most 1.15"):
        assert text in out


def test_turns_rotate_and_every_variant_has_as_many() -> None:
    order: list[str] = []
    step_fns = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = time_in_turns(step_fns, 3, CPU)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order) == 2 * "abc" + "abc" + "bca" + "cab"  # warmed up twice


def test_the_spread_by_hand() -> None:
    values = [4.0, 1.0, 2.0, 3.0, 5.0]
    assert spread(values) == {"median": 3.0, "low": 2.0, "high": 4.0, "samples": values}


@pytest.mark.slow
def test_runs_at_once_are_counted_together() -> None:
    """Two processes that start together: both have taken steps, and at least one each."""
    one, two = (variants.images_at_once(replace(TINY, batch_size=2), 4, count) for count in (1, 2))
    assert one > 2 / variants.SECONDS_AT_ONCE
    assert two > 2 * 2 / variants.SECONDS_AT_ONCE


def test_other_modes_are_timed_beside_a_runs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling is left out here: what is timed is the step that `fast_step` gives."""
    asked: list[bool] = []
    monkeypatch.setattr(variants, "time_in_turns", lambda step_fns, *_: {name: [1.0] for name in step_fns})
    monkeypatch.setattr(training, "fast_step", lambda device, compiled, notify: asked.append(compiled))
    result = variants.bench_training(TINY, 16, 1, False, ["eager", "compile"])
    assert asked.count(True) == 2, "the plain network and the pipeline"
    assert [name for name in result["ratios"] if name.startswith("full")] == [
        "full_over_plain", "full_over_plain_eager", "full_over_plain_compile"
    ]  # fmt: skip
    assert all(variant["first_step_seconds"] > 0 for variant in result["variants"].values())


@pytest.mark.slow
def test_memory_is_measured_in_a_slow_new_process() -> None:
    found = variants.memory_of("plain_fast", TINY)
    assert found["step_bytes"] == found["peak_bytes"] - found["before_bytes"]
    # the activations that backward needs: 8 images, 19 convolutions and their BatchNorms, at least 4 bytes each
    least = 8 * 2 * 4 * (7 * 16 * 32 * 32 + 6 * 32 * 16 * 16 + 6 * 64 * 8 * 8)
    assert least / 2 < found["step_bytes"] < 2**30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "unknown benchmark 'speed': choose one of training, inference"),
        (["training", "--batch-size", "1"], "batch_size=1: need 2..1000000, a whole number"),
        (["inference", "--rounds", "many", "run"], "invalid int value: 'many'"),
        (["training", "--rounds", "0"], "--rounds=0: need 1 or more, a whole number"),
        (["inference", "no-such-run"], "no-such-run"),
        (["--device", "gpu"], "'gpu' is unknown"),
        (["--precision", "fp8"], "'fp8' is unknown"),
        (["--json", "."], "'.' is a folder; name a file in it"),
        (["--json", __file__ + "/x.json"], "cannot be written"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = bench.main(arguments)
    except SystemExit as stopped:  # argparse
        status = int(str(stopped.code))
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err.splitlines()[-1]
    assert captured.out == ""
