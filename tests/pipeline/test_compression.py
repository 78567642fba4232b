"""The stages of compression, what the notebook shows of them, and the benchmark of inference: against other counts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments import bench, pipeline
from experiments.benchmarks import inference
from experiments.notebook import lessons
from experiments.pipeline import compression, configure
from src import training
from src.pruning import analyze_liveness, channel_groups
from src.quantizer import DeadZoneLDZCompander
from src.runs import RunFolder
from utils_quantization import latent_weight, quantized_layers, quantizer_of

DEAD = (1, 4, 5)  # filters of every block's conv1 that are made zero


@pytest.fixture(scope="module")
def run() -> pipeline.Run:
    """One short epoch on 60 digits, then dead filters whose BatchNorm shift is positive: constants, not zeros."""
    config, data = pipeline.prepare_data(configure("smoke", epochs=1, limit=60, batch_size=30, device="cpu"))
    run = pipeline.build_run(config, data)
    assert len(list(run.steps())) == 2
    run.finish_epoch()
    with torch.no_grad():
        for name, layer in quantized_layers(run.model).items():
            quantizer = quantizer_of(layer)
            assert isinstance(quantizer, DeadZoneLDZCompander)
            quantizer.logit_dz.fill_(1.0)
            if name.endswith("conv1"):
                latent_weight(layer)[list(DEAD)] = 0
                norm = run.model.get_submodule(name.replace("conv1", "bn1"))
                assert isinstance(norm, nn.BatchNorm2d)
                norm.bias[list(DEAD)] = torch.tensor([0.5, 0.25, -0.5])
                assert norm.running_mean is not None
                norm.running_mean[list(DEAD)] = 0
    run.model.eval()
    return run


@pytest.fixture(scope="module")
def compressed(run: pipeline.Run, tmp_path_factory: pytest.TempPathFactory) -> compression.Compression:
    baseline = pipeline.build_network(run.config, run.data, run.device)
    result, _ = pipeline.evaluate_run(run)
    return compression.compress(run, baseline, result, tmp_path_factory.mktemp("packed") / "model.cdq")


def test_the_stages_against_other_counts(run: pipeline.Run, compressed: compression.Compression) -> None:
    rows = compressed.stages
    assert list(rows.index) == ["FP32", "quantized", "compacted", "packed"]
    # 18 layers at 8 bits, stem (3*16*9*1024 MACs) and linear (640) at 32
    rest = 3 * 16 * 9 * 1024 + 640
    bops = 40_551_040 * 32 * 32, ((40_551_040 - rest) * 8 + rest * 32) * 32
    assert tuple(rows["BOPs"][:2]) == bops
    with FlopCounterMode(display=False) as counter:
        compressed.network(torch.zeros(1, 3, 32, 32))
    left = counter.get_total_flops() // 2
    assert list(rows["MACs"]) == [40_551_040, 40_551_040, left, left]
    assert left < 40_551_040
    sizes = rows["bytes"]
    assert sizes["packed"] == Path(compressed.packed.path).stat().st_size < sizes["compacted"] < sizes["quantized"]
    assert np.isnan(rows["accuracy"].iloc[0])
    assert len(set(rows["accuracy"].iloc[1:])) == 1
    assert rows["parameters"]["compacted"] == sum(p.numel() for p in compressed.network.parameters())
    times = rows["time / FP32's"]
    assert times.iloc[0]["median"] == 1
    assert compressed.time_ratio == times["packed"]["median"]
    assert all(time["low"] > 0 for time in times)


def test_the_proof_says_equal(compressed: compression.Compression) -> None:
    assert compressed.same_predictions
    assert compressed.largest_difference["float64"] < 1e-10
    assert compressed.largest_difference["float32"] < 1e-4
    assert "the same class for every test image" in compressed.proof()
    text = compressed.table().to_html()
    for shown in ("compacted", "40,551,040", "41.52 G", ">-<"):
        assert shown in text


def test_channels_of_the_table_are_those_of_the_liveness_analysis(run: pipeline.Run) -> None:
    liveness = analyze_liveness(run.model)
    # shifts 0.5 and 0.25 pass the ReLU, -0.5 does not; running mean 0 of a dead filter leaves the shift alone
    assert liveness.propagated_constants("layer1.0.conv1")[list(DEAD)].tolist() == [0.5, 0.25, 0]
    # One count for the figures and for the table's row: of the 18 quantized layers, 672 channels.
    layers = [layer for layer in liveness.layers if layer.name in quantized_layers(run.model)]
    row = pipeline.evaluate_run(run)[0].totals()[0]
    assert (len(layers), row["channels"], sum(layer.out_channels for layer in layers)) == (18, 672, 672)
    sizes = {name: latent_weight(layer).numel() for name, layer in quantized_layers(run.model).items()}
    recorded = training.summarize_layers(training.layer_records(run.model), sizes)
    assert (
        row["dead filters"]
        == sum(layer.dead_out.sum() for layer in layers)
        == round(672 * recorded["structured_sparsity"])
    )
    assert row["channels left"] == sum(len(layer.kept_out) for layer in layers)
    assert row["zeros"] == pytest.approx(recorded["unstructured_sparsity"])
    assert row["bits"] == pytest.approx(recorded["mean_bits"])


def test_counting_dead_filters_as_zeros_changes_the_outputs(run: pipeline.Run) -> None:
    result, _ = pipeline.evaluate_run(run)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    claimed, true = lessons.dead_filter_account(run.model, result, images)
    assert int(claimed["MACs"].replace(",", "")) < int(true["MACs"].replace(",", ""))  # the channels of ones
    assert float(claimed["outputs"].rsplit(" ", 1)[1]) > 0
    assert claimed["count"].startswith(f"{9 * len(DEAD)} dead filters")
    removed = sum(layer.null_out.count for layer in result.structured_stats.layers)
    assert true["count"].startswith(f"{removed} channels removed, {9 * len(DEAD)} of dead filters")
    assert f"; {9 * 2} are constants" in true["count"]
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_logits_under_both_forms_of_decay_by_hand() -> None:
    steps, paths, zeros = lessons.logit_trajectories(50, learning_rate=0.01, decay=0.1)
    assert steps.tolist() == list(range(51))
    np.testing.assert_allclose(paths["decoupled decay"], 3 * (1 - 0.01 * 0.1) ** steps, rtol=1e-5)
    assert paths["squares in the loss"][1] == pytest.approx(2.99)  # Adam's first step is the learning rate
    # theta = 3: half width 2.5758 (1 - tanh 3) = 0.012735; P(|w| <= that) = 0.7979 * 0.012735 = 0.01016
    assert zeros["decoupled decay"][0] == pytest.approx(0.01016, abs=1e-5)


def test_a_dead_zone_of_a_given_share() -> None:
    quantizer = lessons.fixed_quantizer(0.25, 3)
    assert quantizer.dead_zone_share().item() == pytest.approx(0.25)
    _, w, q = lessons.staircase_curve("", 0.25, 3)
    assert np.abs(w[q == 0]).max() == pytest.approx(0.25, abs=1e-3)
    assert len(np.unique(q)) == 7  # 2 (2^(3 - 1) - 1) + 1


def test_tables_hold_what_they_are_given(run: pipeline.Run) -> None:
    groups = channel_groups(run.model)
    number = groups.names.index("layer1.0.conv1[3]")
    rows = lessons.group_table(groups, number).data  # type: ignore[attr-defined]
    assert list(zip(rows["layer"], rows["part"], strict=True)) == [
        ("layer1.0.conv1", "filter"),
        ("layer1.0.bn1", "scale"),
        ("layer1.0.bn1", "shift"),
        ("layer1.0.conv2", "slice that reads it"),
    ]
    result, _ = pipeline.evaluate_run(run)
    assert f"{result.structured_stats.total_macs:,}" in lessons.layer_table(result).to_html()
    assert f"{result.structured_mac_ratio:.2f}x" in lessons.ratio_table(result).to_html()
    said = lessons.most_compressed(result)
    assert "Most channels removed: layer1.0.conv1 (3 of 16), layer1.1.conv1 (3 of 16)" in said
    verdict = pipeline.judge_run(run)
    assert all(finding.name in lessons.verdict_table(verdict).to_html() for finding in verdict.expectations)
    assert "logit_bit" in lessons.optimizer_table(run.optimizer, run.objective).to_html()


def test_the_forms_that_are_timed_compute_the_same(run: pipeline.Run, tmp_path: Path) -> None:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    dense = pipeline.build_network(run.config, run.data, run.device)
    with torch.inference_mode():
        found = {name: take() for name, take in inference.forms(run.model, dense, images, tmp_path, [4]).items()}
        expected = run.model(images)
    rounded = ("PyTorch, multiples of 4", "ONNX Runtime, multiples of 4")
    int8 = ("onnx_int8", "ONNX Runtime, int8, multiples of 4")
    assert set(found) == {*inference.FORMS, *rounded, *int8}
    for name in ("masked", "compacted", "onnx_fp32", "onnx_int", *rounded):
        logits = found[name]
        assert isinstance(logits, torch.Tensor)
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    for name in int8:
        torch.testing.assert_close(found[name], expected, atol=0.2 * expected.abs().max().item(), rtol=0)


def test_the_benchmark_of_a_run(run: pipeline.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder.open(tmp_path / "run")
    folder.save_progress(run.model, run.optimizer, run.progress, asdict(run.config))
    target = tmp_path / "times.json"
    arguments = [str(folder.path), "--batch-sizes", "1", "2", "--rounds", "1", "--json", str(target)]
    assert bench.main(["inference", *arguments]) == 0
    written = json.loads(target.read_text())
    assert list(written["batch_sizes"]) == ["1", "2"]
    assert set(written["batch_sizes"]["1"]) == set(inference.FORMS)
    assert all(form["seconds"]["median"] > 0 for form in written["batch_sizes"]["2"].values())
    assert "ONNX Runtime, compacted, integers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("results", "sentences"),
    [
        (
            {"accuracy_float32": 0.9917, "structured_mac_ratio": 2.5},
            [
                "The compressed network classifies 99.2% of the test images correctly; "
                "what the uncompressed one reaches was not measured.",
                "It needs 40% of the multiply-adds.",
            ],
        ),
        (
            {
                "accuracy_float32": 0.75,
                "baseline_accuracy": 0.8,
                "structured_mac_ratio": 4,
                "packed_ratio": 31.6,
                "time_ratio": 0.625,
            },
            [
                "The compressed network classifies 75.0% of the test images correctly, 5.0 points less than the "
                "uncompressed one (80.0%).",
                "Its file is 32 times smaller, and it needs 25% of the multiply-adds.",
                "Read back from that file, it takes 62% of the uncompressed network's time on this machine.",
            ],
        ),
    ],
)
def test_what_compression_cost_and_gained_in_words(results: dict[str, float], sentences: list[str]) -> None:
    assert pipeline.in_words(results) == sentences
