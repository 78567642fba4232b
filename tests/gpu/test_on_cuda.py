"""What a CPU cannot tell: the compiled step, a compiled run, the doctor and the notebook on a CUDA device.

`tests/gpu/session.sh` runs these with all others that need one (`pytest -m cuda`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import debug_run, pipeline, run_notebook
from experiments.pipeline import TrainingLoop, configure
from experiments.sparsity import coupled_group_lasso
from src.training import CompiledGradients, GraphedStep, Objective, StepFunction, train_step
from tests.reliability.small_run import differences, train
from tests.training.small import batch, optimizer_of, quantized

pytestmark = [pytest.mark.cuda, pytest.mark.slow]
SHORT = {"device": "cuda", "epochs": 2, "limit": 144, "delay": 0}


def losses(step: StepFunction) -> list[list[float]]:
    """The parts of the losses of four steps, with and without the penalty."""
    model = quantized().to("cuda").train()
    optimizer, objective = optimizer_of(model), Objective(coupled_group_lasso(model), 0.01, 0.01)
    images, labels = (part.to("cuda") for part in batch())
    steps = [step(model, optimizer, images, labels, objective, coefficient) for coefficient in (0.0, 0.1, 0.2, 0.0)]
    return [[float(part) for part in vars(each).values()] for each in steps]


def test_a_compiled_and_recorded_step_gives_the_numbers_of_an_eager_one() -> None:
    told: list[str] = []
    compiled = CompiledGradients(told.append)
    recorded = GraphedStep(told.append, compiled)
    assert losses(recorded) == [pytest.approx(row, rel=1e-3) for row in losses(train_step)]
    assert (compiled.failure, recorded.failure) == ("", "")
    assert [line.partition(" in ")[0] for line in told] == 2 * ["compiled the step for batches of 16"]


def test_a_compiled_run_is_resumed_with_the_same_bits(tmp_path: Path) -> None:
    def run() -> pipeline.Run:
        return pipeline.build_run(*pipeline.prepare_data(configure("smoke", compile=True, **SHORT)))

    def stop(step: object) -> None:
        raise KeyboardInterrupt

    train(TrainingLoop.open(run(), tmp_path / "unbroken"))
    with pytest.raises(KeyboardInterrupt):
        train(TrainingLoop.open(run(), tmp_path / "parts"), stop)
    train(TrainingLoop.open(run(), tmp_path / "parts", resume=True))
    assert differences(tmp_path / "parts", tmp_path / "unbroken", command=False) == []


def test_the_doctor_finds_nothing_in_a_healthy_run(tmp_path: Path) -> None:
    flags = [f"--output={tmp_path}", "--preset=smoke", "--epochs=3", "--device=cuda", "--doctor", "--baseline=false"]
    assert debug_run.main(flags) in (0, 1), "so short a run may not reach what is expected of it"
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["machine"]["device"] == "cuda"
    assert report["doctor"]["state"] == "healthy", report["doctor"]["headline"]


def test_the_notebook_runs_to_its_end(tmp_path: Path) -> None:
    settings = {"DATA": "digits", "DEVICE": "cuda", "EPOCHS": 3, "OUTPUT_DIR": tmp_path / "run", "BASELINE": "false"}
    flags = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    page = tmp_path / "page.html"
    done = tmp_path / "done.ipynb"
    assert run_notebook.main([*flags, f"--output-notebook={done}", f"--html={page}"]) in (0, 1)
    assert page.exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["machine"]["device"] == "cuda"
