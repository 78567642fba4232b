"""The baseline: the same training without compression, stored, found again, and compared with the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import pipeline
from experiments.notebook import ProgressBar
from experiments.pipeline import PASSED, Verdict, configure
from experiments.pipeline.baseline import baseline_key, find_baseline
from src import training
from src.training import EpochMeans, Objective
from tests.histories import make_history


@pytest.fixture(scope="module")
def run() -> pipeline.Run:
    """One short epoch of 60 digits."""
    config, data = pipeline.prepare_data(configure("smoke", epochs=2, limit=60, batch_size=30, device="cpu"))
    run = pipeline.build_run(config, data)
    for _ in range(2):
        assert list(run.steps())
        run.finish_epoch()
    return run


def test_the_baseline_is_the_plain_network_trained_alike_and_is_found_again(run: pipeline.Run, tmp_path: Path) -> None:
    notes: list[str] = []
    output = tmp_path / "run"
    found = pipeline.obtain_baseline(run, output, progress=ProgressBar, notify=notes.append)
    assert found is not None
    # the same network without quantizers, trained by hand
    config, data = run.config, run.data
    plain = pipeline.build_network(config, data, run.device)
    optimizer = training.make_optimizer(training.parameter_groups(plain, **config.group_kwargs))
    for epoch in range(2):
        settings = pipeline.epoch_settings(config, epoch, run.precision) | {"coefficient": 0.0}
        for step in training.train_epoch(plain, optimizer, data, Objective(), **settings):
            EpochMeans().add(step)
    stored = pipeline.SavedRun.open(output / "baseline").weights
    for name, tensor in plain.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        own = stored.get(name, stored.get(f"{stem}.parametrizations.{leaf}.original"))
        assert own is not None
        assert torch.equal(own, tensor), name
    assert found.accuracy == training.evaluate(plain, data)[1]

    again = pipeline.obtain_baseline(run, output, progress=ProgressBar, notify=notes.append)
    beside = pipeline.obtain_baseline(run, tmp_path / "other", progress=ProgressBar, notify=notes.append)
    assert again is not None
    assert beside is not None
    assert again.accuracy == beside.accuracy == found.accuracy
    assert [note for note in notes if note.startswith("training the baseline")] == notes[:1]
    assert find_baseline(replace_seed(run), output) is None, "of another configuration"


def replace_seed(run: pipeline.Run) -> pipeline.Run:
    return replace(run, config=replace(run.config, seed=7))


def test_a_long_baseline_is_not_trained_unasked(run: pipeline.Run, tmp_path: Path) -> None:
    notes: list[str] = []
    slow = replace(run, history=training.History(2, [replace(each, seconds=61.0) for each in run.history]))
    assert pipeline.obtain_baseline(slow, tmp_path, progress=ProgressBar, notify=notes.append) is None
    assert "takes about 2 min 02 s here" in notes[0]
    assert "--baseline true" in notes[0]
    assert pipeline.obtain_baseline(slow, tmp_path, False, progress=ProgressBar, notify=notes.append) is None
    assert list(tmp_path.iterdir()) == []


def test_what_has_to_do_with_compression_alone_makes_no_other_baseline() -> None:
    config = configure("debug")
    same = replace(config, peak=0.0, max_bits=4, delay=1, target="", logit_decay_dz=0.5)
    assert baseline_key(config, "data") == baseline_key(same, "data")
    others = {
        baseline_key(replace(config, **change), "data") for change in ({"seed": 1}, {"epochs": 3}, {"flip": False})
    }
    assert len(others | {baseline_key(config, "data"), baseline_key(config, "other data")}) == 5


@pytest.mark.parametrize(("cost", "met"), [(0.019, True), (0.021, False)])
def test_the_verdict_says_whether_it_cost_too_much(cost: float, met: bool) -> None:
    history = make_history()
    verdict: Verdict = pipeline.judge(history, configure("debug"), 10, [], 2000, (0.85 - cost, 0.85))
    (price,) = [each for each in verdict.expectations if each.name == "accuracy kept"]
    assert (price.status == PASSED) == met
    assert price.expected == "costs at most 2 points"
    assert price.measured == f"{100 * cost:.2f} points: {0.85 - cost:.2%} against 85.00%"
