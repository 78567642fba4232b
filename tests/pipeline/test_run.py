"""How long a training will take: said once, after its first seconds, from the steps that were measured."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import pipeline
from experiments.pipeline import TrainingLoop, configure
from src.training import StepLosses


@pytest.fixture
def run() -> pipeline.Run:
    """20 epochs of 2 steps of 30 images each, tested on 60 images, with the arithmetic of a CPU without bfloat16."""
    config, data = pipeline.prepare_data(configure("smoke", epochs=20, limit=60, batch_size=30, device="cpu"))
    return replace(pipeline.build_run(config, data), precision=torch.float32)


def test_an_estimate_counts_steps_and_tests_and_says_why_it_is_long(run: pipeline.Run) -> None:
    # a test of 60 images costs a third of 2 steps: 20 * (2 + 2/3) * 45 s = 2,400 s
    assert run.estimate(45) == (
        "training takes about 40 min on this CPU, which does not multiply bfloat16: 20 epochs of 2 steps"
    )
    asked = replace(run, config=replace(run.config, precision="fp32"))
    assert asked.estimate(600) == "training takes about 8 h 53 min on this CPU: 20 epochs of 2 steps"


def test_the_estimate_is_given_once_and_leaves_out_slow_first_steps(
    run: pipeline.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object) -> StepLosses:
        time.sleep((0.5 if len(taken) == 1 else 0.1) if len(taken) % 2 else 1)  # the first that is timed is watched
        taken.append(0)
        return StepLosses(*[torch.tensor(1.0)] * 5)

    lines: list[str] = []
    taken: list[int] = []
    monkeypatch.setattr(pipeline.run, "ESTIMATE_SECONDS", 0.25)
    monkeypatch.setattr(pipeline.run, "ESTIMATE_STEPS", 3)
    run.step_fn = step  # type: ignore[assignment]
    loop = TrainingLoop.open(run, tmp_path, notify=lines.append)
    for _ in range(3):
        assert list(loop.steps())
        run.finish_epoch()
    (line,) = lines
    # after three epochs' second steps 18 * (2 + 2/3) - 2 are left, of a tenth of a second each: 4.6 s
    seconds = re.fullmatch(r"training takes about (\d+) s on this CPU, .*: 18 epochs of 2 steps", line)
    assert seconds is not None, line
    assert 4 <= int(seconds[1]) < 10
