"""The settings of the recipe that are off by default: each against what it says, worked out another way."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import pipeline
from experiments.notebook import ProgressBar
from experiments.pipeline import DEBUG, TrainingLoop, configure
from metrics import ModelStats, QuantizationComparison
from src.runs import CHECKPOINT, RunError, load_checkpoint
from src.runs.checkpoint import state_bytes
from src.training import Objective, TrainingError, task_loss
from utils_quantization import latent_weight, quantized_layers, quantizer_of

CPU = torch.device("cpu")


def run(**changes: Any) -> pipeline.Run:
    """One or two steps an epoch of resnet20 on 30 digits."""
    config = configure("smoke", device="cpu", limit=30, batch_size=30, **{"epochs": 2, "delay": 1, **changes})
    return pipeline.build_run(*pipeline.prepare_data(config))


def train(loop: TrainingLoop) -> None:
    with loop:
        for _ in loop.epochs():
            assert list(loop.steps())
            loop.finish_epoch()


def test_the_warm_up_is_a_line_from_0_to_the_rate_without_it() -> None:
    config = replace(DEBUG, epochs=10, learning_rate_shape="cosine", warmup_epochs=2)
    factor = config.lr_lambda()
    cosine = {done: (1 + math.cos(math.pi * done)) / 2 for done in (0.05, 0.1, 0.2, 0.5, 1.0)}
    assert factor(0.0) == 0
    assert factor(0.05) == pytest.approx(cosine[0.05] / 4)
    assert factor(0.1) == pytest.approx(cosine[0.1] / 2)
    assert [factor(done) for done in (0.2, 0.5, 1.0)] == [cosine[done] for done in (0.2, 0.5, 1.0)]


def log_softmax(scores: Any) -> Any:
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


def test_the_task_loss_by_hand() -> None:
    """Smoothed labels and a teacher, in numpy; off, it is the cross-entropy to the last bit."""
    images, labels = torch.randn(6, 12), torch.arange(6) % 4
    student, teacher = torch.nn.Linear(12, 4), torch.nn.Linear(12, 4)
    scores, given = student(images), teacher(images).detach().double().numpy()
    own, target = scores.detach().double().numpy(), np.eye(4)[labels]
    smoothed = -((0.9 * target + 0.1 / 4) * log_softmax(own)).sum(1).mean()
    soft, student_soft = np.exp(log_softmax(given / 3)), log_softmax(own / 3)
    distance = (soft * (np.log(soft) - student_soft)).sum(1).mean()

    assert task_loss(scores, images, labels, Objective()).equal(torch.nn.functional.cross_entropy(scores, labels))
    assert task_loss(scores, images, labels, Objective(label_smoothing=0.1)).item() == pytest.approx(smoothed)
    objective = Objective(label_smoothing=0.1, teacher=teacher, distill=0.7, temperature=3.0)
    loss = task_loss(scores, images, labels, objective)
    assert loss.item() == pytest.approx(0.3 * smoothed + 0.7 * 9 * distance)
    loss.backward()
    assert teacher.weight.grad is None


def test_a_run_learns_from_its_own_baseline(tmp_path: Path) -> None:
    """The teacher is trained first, in the run's folder, and found there by whoever needs it next."""
    notes: list[str] = []
    student = run(distill=0.5, target="bops 30%", label_smoothing=0.1)
    with pytest.raises(TrainingError, match="no teacher yet"):
        next(student.steps())
    pipeline.add_teacher(student, tmp_path, progress=ProgressBar, notify=notes.append)
    assert notes == ["training the baseline, without quantizers and penalty"]
    teacher = student.objective.teacher
    assert teacher is not None
    stored = load_checkpoint(tmp_path / "baseline" / CHECKPOINT)
    assert (stored["config"]["distill"], stored["config"]["label_smoothing"]) == (0.0, 0.1)
    assert all(torch.equal(own, stored["model"][name]) for name, own in teacher.state_dict().items())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    train(TrainingLoop.open(student, tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert student.objective.label_smoothing == 0.1, "with a budget, too"
    other = run(label_smoothing=0.1)  # the same baseline
    assert pipeline.obtain_baseline(other, tmp_path, progress=ProgressBar, notify=notes.append)
    assert "was trained before" in notes[-1]


def test_the_stem_has_bits_of_its_own(tmp_path: Path) -> None:
    """8 bits without a gradient; the other layers are as without it, and the account counts the stem's bits."""
    plain, own = run(), run(stem_bits=8)
    assert own.attached == ["conv1", *plain.attached] == list(quantized_layers(own.model))
    assert pipeline.expected_layers(own.config, own.model) == own.attached
    stem = own.model.conv1
    assert len(stem.weight.unique()) <= 2**8 - 1
    assert not torch.equal(stem.weight, latent_weight(stem))
    assert not any(p.requires_grad for p in quantizer_of(stem).parameters())
    state = own.model.state_dict()
    others = {name: value for name, value in plain.model.state_dict().items() if not name.startswith("conv1.")}
    assert all(torch.equal(value, state[name]) for name, value in others.items())
    stats: ModelStats = QuantizationComparison().set_baseline(own.model)
    layer = next(each for each in stats.layers if each.name == "conv1")
    assert layer.bitwidth == 8
    assert layer.bops == 3 * 16 * 3 * 3 * 32 * 32 * 8 * 32
    train(TrainingLoop.open(own, tmp_path))
    read = pipeline.SavedRun.open(tmp_path).network()
    assert torch.equal(read.conv1.weight, own.model.conv1.weight)


def test_a_run_from_before_a_setting_is_resumed_with_its_default(tmp_path: Path) -> None:
    first = run()
    loop = TrainingLoop.open(first, tmp_path)
    with loop:
        assert list(loop.steps())
        loop.finish_epoch()
    state = load_checkpoint(tmp_path / CHECKPOINT)
    young = ("compile", "warmup_epochs", "label_smoothing", "distill", "temperature", "stem_bits")
    state["config"] = {name: value for name, value in state["config"].items() if name not in young}
    (tmp_path / CHECKPOINT).write_bytes(state_bytes(state))
    assert pipeline.SavedRun.open(tmp_path).config == first.config
    assert TrainingLoop.open(run(), tmp_path, resume=True).epochs() == range(1, 2)
    with pytest.raises(RunError, match=r"warmup_epochs: 0 then, 1 now"):
        TrainingLoop.open(run(warmup_epochs=1), tmp_path, resume=True)
