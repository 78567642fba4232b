"""Comparing runs: costs are those of the metrics, tables say what differs, a bad folder is told with its contents."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import compare, figures
from experiments.evaluator import Evaluator
from experiments.notebook import explorers
from experiments.pipeline import RunConfig, comparison, configure
from experiments.pipeline.comparison import dense_macs, relative_bops
from resnet import resnet20
from src.runs import CHECKPOINT, RunError, RunProgress
from src.runs.checkpoint import checkpoint_bytes
from src.training import EpochMeans, History, layer_records
from tests.histories import make_history
from tests.quantized_networks import mixed_resnet20


def save(path: Path, config: RunConfig, epochs: int, summary: str = "") -> None:
    path.mkdir(parents=True)
    model = torch.nn.Sequential()
    model.linear = torch.nn.Linear(4, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    progress = RunProgress(make_history(epochs, config.epochs), EpochMeans())
    (path / CHECKPOINT).write_bytes(checkpoint_bytes(model, optimizer, progress, asdict(config)))
    if summary:
        (path / "run.json").write_text(summary)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three runs: the present one, one before it, and one beside it that was not finished."""
    debug = configure("debug", data="cifar10")
    verdict = '{"verdict": {"state": "healthy"}, "data": {"name": "cifar10"}}'
    save(tmp_path / "out", debug, 20, verdict)
    save(tmp_path / "out" / "previous" / "2", replace(debug, seed=1, peak=0.02), 20, verdict)
    save(tmp_path / "beside", replace(debug, data_root="/elsewhere"), 5)
    (tmp_path / "no run").mkdir()
    (tmp_path / "a file").write_text("")
    return tmp_path


def test_relative_bops_are_those_of_the_metrics() -> None:
    model = mixed_resnet20()
    layers = layer_records(model)
    history = History(1, [replace(make_history(1).records[0], layers=layers)])
    result = Evaluator(resnet20()).evaluate(model)
    found = relative_bops(history, dense_macs(configure("debug"), 10))
    assert found[0] == pytest.approx(1 / result.unstructured_bops_ratio, rel=1e-9)
    assert sum(dense_macs(configure("debug"), 10).values()) == 40_551_040


def test_runs_are_found_around_a_folder(runs: Path) -> None:
    found = comparison.find_runs(runs / "out")
    assert list(found) == ["out", "out/previous/2", "beside"]
    assert comparison.read_run(found["out/previous/2"]).config.seed == 1
    assert list(comparison.find_runs(runs / "nothing here")) == ["beside", "out", "out/previous/2"]


def test_tables_hold_what_differs_and_what_came_out(runs: Path) -> None:
    read = [comparison.read_run(path, label) for label, path in comparison.find_runs(runs / "out").items()]
    assert comparison.differing_settings(read) == [
        {"setting": "seed", "out": "0", "out/previous/2": "1", "beside": "0"},
        {"setting": "peak", "out": "0.008", "out/previous/2": "0.02", "beside": "0.008"},
    ]
    first, _, last = comparison.results(read)
    assert first["accuracy"] == "80.0%"
    assert first["verdict"] == "healthy"
    assert (last["epochs"], last["accuracy"], last["verdict"]) == ("5 of 20", "42.5%", "not finished")
    assert comparison.differing_settings(read[:1]) == []


def test_the_figures_draw_every_epoch_of_every_run(runs: Path) -> None:
    found = comparison.find_runs(runs / "out")
    read = [comparison.series(comparison.read_run(path, label)) for label, path in found.items()]
    curves = figures.run_curves(read)
    accuracy, zeros, _, bits = curves.axes
    named = {text.get_text() for text in curves.legends[0].get_texts()}
    assert named == {"out", "out/previous/2", "beside"}
    np.testing.assert_allclose(accuracy.get_lines()[2].get_ydata(), [32.5, 35, 37.5, 40, 42.5])
    np.testing.assert_allclose(zeros.get_lines()[0].get_ydata(), [2.0 * epoch for epoch in range(1, 21)])
    np.testing.assert_allclose(bits.get_lines()[0].get_ydata(), make_history(20).column("mean_bits"))
    assert "“out” ends at 80.0 % accuracy after epoch 20; none of the 3 runs does better" in curves.get_label()
    plane = figures.run_plane(read)
    (axes,) = plane.axes
    np.testing.assert_allclose(axes.get_lines()[0].get_xdata(), 100 * read[0].relative_bops)
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), 100 * read[0].history.column("accuracy"))
    assert axes.get_lines()[1].get_xdata() == pytest.approx([100 * read[0].relative_bops[-1]])
    assert f"{100 * read[0].relative_bops[-1]:.1f} %" in plane.get_label()


def test_the_command_writes_figures_and_prints_tables(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(runs / "out"), str(runs / "out" / "previous" / "2")]
    assert compare.main([*folders, "--output", str(runs / "both.png")]) == 0
    assert {path.name for path in runs.glob("*.png")} == {"both.png", "both_plane.png"}
    told = capsys.readouterr().out
    assert "peak 0.008           0.02" in told
    assert compare.main([*folders, "--output", str(runs / "made")]) == 0
    assert sorted(path.name for path in (runs / "made").iterdir()) == ["comparison.txt", "curves.png", "plane.png"]
    assert (runs / "made" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line_and_nothing_is_written(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "no run" / "notes.txt").write_text("")
    (runs / "hidden").mkdir()
    (runs / "hidden" / ".lock").write_text("")
    save(runs / "begun", configure("debug"), 0)
    save(runs / "damaged", configure("debug"), 1)
    (runs / "damaged" / CHECKPOINT).write_bytes((runs / "out" / CHECKPOINT).read_bytes()[:2000])
    for folders, output, reason in (
        (["no run"], "x.png", "in it are notes.txt; name the output folder of a run, with checkpoint.pt"),
        (["hidden"], "x.png", "it is empty"),
        (["a file"], "x.png", "there is no such folder"),
        (["nowhere"], "x.png", "there is no such folder"),
        (["begun"], "x.png", "has not finished an epoch"),
        (["out", "damaged"], "x.png", "cannot be read"),
        (["out", "out"], "x.png", "named twice"),
    ):
        assert compare.main([*(str(runs / folder) for folder in folders), "--output", str(runs / output)]) == 2
        told = capsys.readouterr().err
        assert reason in told
        assert "--resume" not in told, "nothing is trained here"
    assert not list(runs.glob("x.*"))
    (runs / "no run" / "deeper").mkdir()
    with pytest.raises(RunError, match="no run to compare around"):
        explorers.runs(runs / "no run" / "deeper")


def test_runs_on_different_images_are_not_compared_in_silence(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(runs / "digits", configure("smoke"), 20, '{"data": {"name": "digits"}}')
    assert compare.main([str(runs / "out"), str(runs / "digits"), "--output", str(runs / "x.png")]) == 0
    told = capsys.readouterr().out
    assert "NOTICE: these runs were trained on different images (out on cifar10, digits on digits)" in told
    same = [comparison.read_run(runs / name) for name in ("out", "beside")]
    assert comparison.notices(same) == []
    other = [replace(run, data_digest=digest) for run, digest in zip(same, ("aa", "bb"), strict=True)]
    assert len(comparison.notices(other)) == 1, "one name, other images"
    renamed = [replace(same[0], data_digest="aa"), replace(same[0], data_digest="aa", summary={})]
    assert comparison.notices(renamed) == comparison.differing_settings(renamed) == []
