"""Explorers: the figures hold the numbers of the layer and the image, and follow their controls."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import figures, pipeline
from experiments.doctor import Report
from experiments.doctor.causes.catalogue import causes
from experiments.doctor.report import BEFORE, FAILED, PASSED, Finding
from experiments.figures import COMPACTED, FLOAT, QUANTIZED
from experiments.notebook import explorers, lessons
from experiments.notebook.image_trace import ThreeNetworks
from experiments.pipeline import Run, RunConfig, configure
from resnet import BasicBlock, ResNet
from src.data import normalize
from src.runs import CHECKPOINT, EDGES, RunFolder, RunProgress, Snapshots
from tests.histories import make_history
from tests.notebook.conftest import Screen
from tests.quantized_networks import small_resnet
from utils_quantization import latent_weight, quantization, quantized_layers, quantizer_of


@pytest.fixture(scope="module")
def loaded() -> Run:
    """A run of resnet20 on 40 digits whose two epochs were made by hand: training it would tell nothing more here."""
    config, data = pipeline.prepare_data(configure("smoke", limit=40, epochs=2, batch_size=20, device="cpu"))
    run = pipeline.build_run(config, data)
    run.snapshots = Snapshots(run.attached)
    run.snapshots.add(run.model, 0)
    layer = run.model.get_submodule("layer2.0.conv1")
    for epoch in (1, 2):
        with torch.no_grad():
            latent_weight(layer)[: 4 * epoch] *= 1e-6
            quantizer_of(layer).logit_dz.fill_(1.0)
        run.snapshots.add(run.model, epoch)
    run.model.eval()
    return run


def test_the_layer_figure_draws_one_epoch_under_the_grid_of_that_epoch(loaded: Run) -> None:
    snapshots = loaded.snapshots
    name = "layer2.0.conv1"
    now = snapshots.view(name, 1)
    figure = figures.layer_figure(now, list(snapshots.through(name)), subtitle="a run")
    weights, dead, course, bits = figure.axes
    label = figure.get_label()
    assert f"{name} after epoch 1" in label
    assert "4 of 32 filters dead" in label
    assert "At the end, epoch 2: " in label
    assert "8 filters dead" in label.split("At the end")[1]
    zone, bars = weights.patches[0], weights.patches[1]
    corners = zone.get_extents().transformed(weights.transData.inverted()).intervalx
    assert corners == pytest.approx([-now.zone_share, now.zone_share])
    np.testing.assert_allclose(bars.get_data().values, 100 * now.counts[1:-1] / 32 / 16 / 9)
    np.testing.assert_array_equal(bars.get_data().edges, EDGES)
    flags = np.concatenate([row.get_array() for row in dead.collections])
    assert flags.shape == (32, 3)
    assert [int((flags[:, epoch] == 0).sum()) for epoch in range(3)] == [0, 4, 8]
    zeros = course.get_lines()[0].get_ydata()
    np.testing.assert_allclose(zeros, [100 * seen.sparsity for seen in snapshots.through(name)])
    np.testing.assert_allclose(bits.get_lines()[0].get_ydata(), [seen.bits for seen in snapshots.through(name)])
    assert "before training" in figures.layer_figure(snapshots.view(name, 0), [now]).get_label()


@pytest.fixture(scope="module")
def networks() -> ThreeNetworks:
    """Widths 4, 6, 8; some filters dead; images of 32 x 32."""
    _, data = pipeline.prepare_data(configure("smoke", limit=20, device="cpu"))
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1], 10, widths=(4, 6, 8))
    trained = small_resnet((8, 4, 2))
    pipeline.attach(configure("smoke"), model)
    model.load_state_dict(
        {**model.state_dict(), **{k: v for k, v in trained.state_dict().items() if not k.startswith("linear")}}
    )
    with torch.no_grad():
        latent_weight(model.get_submodule("layer1.0.conv1"))[[1, 3]] = 0
    return ThreeNetworks(model.eval(), data)


def test_three_networks_see_one_image(networks: ThreeNetworks) -> None:
    data, model = networks.data, networks.model
    image = normalize(data.test_images[3:4], data.mean, data.std)
    layer = "layer1.0.conv1"
    trace = networks.trace(3, layer)
    seen: list[torch.Tensor] = []
    hook = model.get_submodule("layer1.0.bn1").register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        scores = model(image)[0]
    hook.remove()
    np.testing.assert_allclose(trace.scores[QUANTIZED], scores, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(trace.maps[QUANTIZED], seen[0][0].numpy()[trace.channels], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(trace.scores[COMPACTED], scores, rtol=1e-4, atol=1e-5)
    kept = np.isin(trace.channels, trace.stage.kept)
    assert 0 < kept.sum() < len(kept)
    np.testing.assert_allclose(trace.maps[COMPACTED][kept], trace.maps[QUANTIZED][kept], rtol=1e-4, atol=1e-5)
    assert np.isnan(trace.maps[COMPACTED][~kept]).all()
    weight = model.get_submodule(layer).weight.detach()
    for channel in trace.channels[~kept]:
        read_by = model.get_submodule("layer1.0.conv2").weight[:, channel]
        constant = not weight[channel].any()
        assert constant or not read_by.any(), "what is gone is constant or unread"
    assert trace.said(QUANTIZED)[0] == data.class_names[int(scores.argmax())]
    assert trace.said(QUANTIZED)[1] == pytest.approx(float(scores.softmax(0).max()), rel=1e-4)


def test_the_float_network_has_the_latent_weights_and_statistics_of_its_own(networks: ThreeNetworks) -> None:
    model, alone = networks.model, networks.float
    images = normalize(networks.data.train_images, networks.data.mean, networks.data.std)
    with torch.no_grad(), quantization(model, enabled=False):
        stem = torch.nn.functional.conv2d(images, model.conv1.weight, padding=1)
    np.testing.assert_allclose(alone.bn1.running_mean, stem.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not torch.equal(alone.bn1.running_mean, model.bn1.running_mean)
    name, layer = next(iter(quantized_layers(alone).items()))
    assert torch.equal(layer.weight, latent_weight(model.get_submodule(name)))
    trace = networks.trace(0, "layer1.0.conv1")
    assert not np.allclose(trace.scores[FLOAT], trace.scores[QUANTIZED])


def test_the_image_figure_shows_answers_maps_and_what_is_gone(networks: ThreeNetworks) -> None:
    trace = networks.trace(3, "layer1.0.conv1")
    figure = figures.image_figure(trace, subtitle="a note")
    picture, scores, maps = figure.axes
    assert "channels behind layer1.0.conv1: " in figure.get_supxlabel()
    np.testing.assert_array_equal(picture.get_images()[0].get_array(), trace.image.transpose(1, 2, 0))
    drawn = {str(line.get_label()): np.asarray(line.get_xdata()) for line in scores.get_lines()}
    for network in (FLOAT, QUANTIZED, COMPACTED):
        np.testing.assert_allclose(drawn[network], trace.scores[network])
    shown = np.asarray(maps.get_images()[0].get_array().filled(np.nan))
    grounds = {patch.get_xy(): patch for patch in maps.patches}
    side = shown.shape[0] // 3
    for row, network in enumerate((FLOAT, QUANTIZED, COMPACTED)):
        for column, values in enumerate(trace.maps[network]):
            high, wide = values.shape
            drawn_map = shown[row * side : row * side + high, column * side : column * side + wide]
            limit = max(np.abs(trace.maps[name][column]).max() for name in (FLOAT, QUANTIZED))
            np.testing.assert_allclose(drawn_map * limit, values, rtol=1e-6)
            assert bool(grounds[column, row].get_hatch()) == np.isnan(values).all()
    assert [text.get_text() for text in maps.get_xticklabels()] == [str(channel) for channel in trace.channels]
    answer, share = trace.said(COMPACTED)
    assert f"compacted “{answer}” {100 * share:.0f} %" in figure.get_label()
    assert f"removal keeps {len(trace.stage.kept)} of its 4 channels" in figure.get_label()


def test_a_dead_network_is_shown_without_a_compacted_one(networks: ThreeNetworks) -> None:
    import copy

    model = copy.deepcopy(networks.model)
    with torch.no_grad():
        model.linear.weight.zero_()
    dead = ThreeNetworks(model, networks.data)
    trace = dead.trace(0, "conv1")
    assert dead.missing.startswith("the network is dead")
    assert set(trace.scores) == {FLOAT, QUANTIZED}
    assert "compacted" not in figures.image_figure(trace).get_label()


def test_samples_have_the_distributions_they_are_called_after() -> None:
    samples = explorers.weight_samples(3, small_resnet())
    normal, laplace, uniform = (samples[name] for name in ("normal", "Laplace (long tails)", "uniform (no tails)"))
    assert all(torch.equal(value, explorers.weight_samples(3)[name]) for name, value in list(samples.items())[:4])
    kurtosis = {}
    for name, sample in (("normal", normal), ("laplace", laplace), ("uniform", uniform)):
        centred = sample.double() - sample.double().mean()
        kurtosis[name] = float((centred**4).mean() / (centred**2).mean() ** 2)
    assert kurtosis == pytest.approx({"normal": 3.0, "laplace": 6.0, "uniform": 1.8}, rel=0.1)
    assert next(name for name in samples if name.startswith("trained")) == "trained: layer1.0.conv1"
    assert uniform.abs().max() <= 1


def test_the_quantizer_figure_counts_what_the_quantizer_does(screen: Screen, controls: dict[str, Any]) -> None:
    weights = explorers.weight_samples(0)["normal"]
    explorers.quantizer({"normal": weights})
    controls["bits"].value = 3
    w = weights.double().numpy()
    range_ = np.quantile(np.abs(w), 0.99)
    zeros = (np.abs(w) <= 0.25 * range_).mean()
    assert f"3 bits: {100 * zeros:.1f} % zeros, 7 of 7 levels used" in screen.alt(0)
    _, grid, values = lessons.staircase_curve("", 0.25, 3)
    assert grid.max() > 1.25, "beyond R, where the quantizer cuts off"
    assert values[grid > 1.01] == pytest.approx(1.0, abs=1e-3)
    assert np.abs(grid[values == 0]).max() == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "moves", "told"),
    [
        (
            "quantizer",
            [("weights", "normal"), ("bits", 2)],
            ["±0.25 R, 4 bits: ", "±0.25 R, 4 bits: ", "±0.25 R, 2 bits: "],
        ),
        (
            "layers",
            [("epoch", 1), ("layer", "layer1.0.conv2")],
            ["layer2.0.conv1 after epoch 2", "layer2.0.conv1 after epoch 1", "layer1.0.conv2 after epoch 1"],
        ),
        ("kernels", [("layer", "layer1.0.conv2")], ["layer2.0.conv1: ", "layer1.0.conv2: "]),
        (
            "images",
            [("image", 2), ("layer", "layer1.0.conv1")],
            ["behind layer2.0.conv1 in 3", "Test image 2 is", "behind layer1.0.conv1 in 3"],
        ),
    ],
)
def test_explorers_follow_their_controls(
    loaded: Run, screen: Screen, controls: dict[str, Any], name: str, moves: list[tuple[str, Any]], told: list[str]
) -> None:
    """Each starts at the most pruned layer and draws one figure a move, in one display."""
    arguments = {
        "quantizer": (explorers.weight_samples(0, loaded.model),),
        "layers": (loaded.snapshots, loaded.subtitle),
        "kernels": (loaded.model,),
        "images": (loaded.model, loaded.data),
    }
    getattr(explorers, name)(*arguments[name])
    for control, value in moves:
        controls[control].value = value
    assert len(screen.displays) == 1, "one display, then updated"
    assert len(screen.alts) == len(told)
    assert all(words in alt for words, alt in zip(told, screen.alts, strict=True)), screen.alts


def test_a_layer_that_is_chosen_in_one_explorer_is_shown_in_all(
    loaded: Run, screen: Screen, controls: dict[str, Any]
) -> None:
    explorers.kernels(loaded.model)
    explorers.quantizer(explorers.weight_samples(0, loaded.model))
    explorers.layers(loaded.snapshots)
    controls["layer"].value = "layer1.0.conv2"
    assert screen.alt(0).count("layer1.0.conv2: ") == 1
    assert controls["weights"].value == "trained: layer1.0.conv2"
    controls["weights"].value = "normal"
    assert controls["layer"].value == "layer1.0.conv2", "no layer, nothing to follow"
    controls["weights"].value = "trained: layer3.0.conv1"
    assert "layer3.0.conv1 after epoch 2" in screen.alt(2)


def test_a_button_goes_to_the_next_image_that_the_network_gets_wrong(
    loaded: Run, screen: Screen, controls: dict[str, Any]
) -> None:
    explorers.images(loaded.model, loaded.data)
    data = loaded.data
    with torch.no_grad():
        answers = loaded.model(normalize(data.test_images, data.mean, data.std)).argmax(1)
    wrong = (answers != data.test_labels).nonzero()[:, 0].tolist()
    (button,) = controls["helpers"]
    seen = []
    for _ in range(3):
        button.click()
        seen.append(controls["image"].value)
    assert seen == [number for number in wrong if number > 0][:3]
    assert f"Test image {seen[-1]} is" in screen.alt(0)


def diagnosed(name: str) -> Report:
    if name == "impossible":
        raise RuntimeError("no such <pipeline>")
    passed = Finding("all well", "", BEFORE, "1", "1", PASSED)
    failed = Finding("a check", "", BEFORE, "1", "2", FAILED, causes("learning-rate-zero"))
    return Report((passed,) if name == "nothing" else (passed, failed))


def test_a_chosen_fault_replaces_the_answer_and_the_figure(screen: Screen, controls: dict[str, Any]) -> None:
    breaks = {"nothing": "Nothing.", "a <fault>": "This breaks <it>.", "impossible": "No."}
    explorers.faults(breaks, diagnosed)
    (answer, _), figure = screen.displays[0], screen.alt(1)
    assert "This breaks &lt;it&gt;." in answer["text/html"]
    assert "1 of 2 checks failed. Most likely: a learning rate is 0" in answer["text/html"]
    assert answer["text/html"].count("<table") == 1, "what failed, alone"
    assert "FAILED before training: a check" in answer["text/html"]
    assert "all well" not in answer["text/html"]
    assert "1 of 2 checks failed" in figure
    controls["fault"].value = "nothing"
    answer, _ = screen.displays[0]
    assert "no fault found; 1 checks passed" in answer["text/html"]
    assert "<table" not in answer["text/html"]
    assert screen.alt(1) != figure
    controls["fault"].value = "impossible"  # what cannot be examined leaves what is there
    assert screen.displays[0][0] == answer


def save_run(path: Path, config: RunConfig, epochs: int) -> None:
    model = torch.nn.Sequential()
    model.linear = torch.nn.Linear(4, 10)
    place = RunFolder.open(path)
    progress = RunProgress(make_history(epochs, 20))
    place.save_progress(model, torch.optim.AdamW(model.parameters()), progress, asdict(config))


def test_the_explorer_of_runs_follows_the_choice(tmp_path: Path, screen: Screen, controls: dict[str, Any]) -> None:
    """Two figures and the tables, each in its own display; a damaged run is named and left out."""
    save_run(tmp_path / "out", configure("debug"), 20)
    save_run(tmp_path / "out/previous/2", configure("debug", seed=1), 20)
    save_run(tmp_path / "beside", configure("debug"), 5)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / CHECKPOINT).write_bytes(b"no checkpoint")
    explorers.runs(tmp_path / "out")
    pick = controls["runs"]
    assert pick.value == ("out", "out/previous/2", "beside")
    assert len(screen.displays) == 3
    assert "none of the 3 runs" in screen.alt(0)
    assert "previous/2" in screen.displays[2][0]["text/html"]
    pick.value = ("out", "beside")
    tables = screen.displays[2][0]
    assert "none of the 2 runs" in screen.alt(0)
    assert "previous/2" not in screen.alt(1) + tables["text/html"] + tables["text/plain"]
    assert "Settings that differ" in tables["text/plain"]
    assert "Not read: damaged: " in tables["text/plain"]
    pick.value = ("beside",)
    assert "ends at 42.5 % accuracy after epoch 5." in screen.alt(0)
    assert "Settings that differ" not in screen.displays[2][0]["text/plain"], "one run differs from nothing"
    pick.value = ()
    assert "“out”" in screen.alt(0), "with nothing chosen the first stays"


def test_a_run_alone_has_a_plane_and_no_curves(tmp_path: Path, screen: Screen) -> None:
    save_run(tmp_path / "out", configure("debug"), 5)
    explorers.runs(tmp_path / "out")
    assert len(screen.displays) == 2
    assert "relative bit operations" in screen.alt(0)
