"""What compression costs in accuracy: the same network, recipe, seed and epochs without quantizers and penalty.

The baseline is a run like any other, in the folder `baseline` of the run it belongs to, trained by the same functions:
it can be interrupted, resumed and compared.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.pipeline.config import RunConfig, check_choice
from experiments.pipeline.run import Baseline, Run, TrainingLoop
from experiments.pipeline.saved_run import SavedRun
from experiments.pipeline.stages import build_run
from src import training
from src.data import steps_per_epoch
from src.runs import SUMMARY, RunError
from src.storage import Notify, duration
from utils_quantization import toggle_quantization

FOLDER = "baseline"
AUTO_SECONDS = 120
WISHES = ("auto", "true", "false")
SHAPING = (
    "model",
    "shortcut",
    "epochs",
    "batch_size",
    "limit",
    "seed",
    "precision",
    "crop_padding",
    "flip",
    "learning_rate",
    "learning_rate_shape",
    "hold",
    "warmup_epochs",
    "label_smoothing",
)


def baseline_key(config: RunConfig, data_digest: str) -> str:
    """A digest of what shapes a baseline: data and every setting that has nothing to do with compression."""
    shaping = [data_digest, *(getattr(config, name) for name in SHAPING)]
    return hashlib.sha256(json.dumps(shaping).encode()).hexdigest()


def baseline_run(run: Run) -> Run:
    """The untrained baseline of `run`: its quantizers switched off, nothing but the task in the loss."""
    plain = replace(run.config, target="", peak=0.0, logit_decay_dz=0.0, logit_decay_bit=0.0, distill=0.0)
    plain = replace(plain, continued_from=None, given=())
    baseline = build_run(plain, run.data)
    toggle_quantization(baseline.model, False)
    return baseline


def find_baseline(run: Run, output: str | Path) -> Baseline | None:
    """The finished baseline of the same configuration in the run's folder `output`, or in a folder beside it."""
    output, wanted = Path(output).absolute(), baseline_key(run.config, run.data.digest)
    for folder in [output / FOLDER, *sorted(output.parent.glob(f"*/{FOLDER}"))]:
        try:
            saved = SavedRun.open(folder)
        except (RunError, OSError):
            continue
        if baseline_key(saved.config, saved.data_digest) == wanted and len(saved.history) == saved.config.epochs:
            network = saved.network().to(run.device)
            toggle_quantization(network, False)
            return Baseline(training.evaluate(network, run.data)[1], saved.history, folder)
    return None


def obtain_baseline(
    run: Run,
    output: str | Path,
    wish: str | bool = "auto",
    *,
    progress: Callable[[int, int, int, int], Any],
    notify: Notify,
) -> Baseline | None:
    """The baseline of the trained `run`: a stored one, or one that is trained now; None where neither is wanted.

    wish: "auto" trains where that takes less than two minutes by the run's own epochs, but adds nothing to a run that
    has its results; "true" always trains, "false" neither looks nor trains; a bool will do. progress:
    experiments.notebook.ProgressBar, or another with its methods. What is interrupted is resumed the next time.
    """
    check_choice("baseline", wish := str(wish).lower(), WISHES)  # text, from a command line
    if wish == "false":
        return None
    if found := find_baseline(run, output):
        notify(f"the run without compression was trained before: {os.path.relpath(found.folder)}")
        return found
    seconds = sum(record.seconds for record in run.history) / max(len(run.history), 1) * run.config.epochs
    if wish == "auto" and (seconds > AUTO_SECONDS or (Path(output) / SUMMARY).exists()):
        notify(
            f"what compression costs in accuracy is not measured: a baseline takes about {duration(seconds)} here; "
            "the same command with --resume --baseline true (in the notebook RESUME = True, BASELINE = True) trains it"
        )
        return None
    notify("training the baseline, without quantizers and penalty")
    baseline, folder = baseline_run(run), Path(output) / FOLDER
    try:
        loop = TrainingLoop.open(baseline, folder, resume=True, notify=notify)
    except RunError:  # the folder holds none, or one of another configuration
        loop = TrainingLoop.open(baseline, folder, notify=notify)
    steps = steps_per_epoch(run.data, run.config.batch_size)
    with progress(run.config.epochs, steps, len(baseline.history), baseline.means.steps) as bar, loop:
        for epoch in loop.epochs():
            for step in loop.steps():
                bar.step(epoch + 1, step.index + 1, step.loss)
            bar.epoch_done(loop.finish_epoch())
    return Baseline(training.evaluate(baseline.model, run.data)[1], baseline.history, folder)


def add_teacher(run: Run, output: str | Path, *, progress: Callable[[int, int, int, int], Any], notify: Notify) -> None:
    """Let `run` learn from its baseline where its configuration says so (`distill`); the baseline is trained first.

    The arguments are those of `obtain_baseline`.
    """
    if not run.config.distill:
        return
    baseline = obtain_baseline(run, output, True, progress=progress, notify=notify)
    assert baseline
    teacher = SavedRun.open(baseline.folder).network().to(run.device).requires_grad_(False)
    toggle_quantization(teacher, False)
    run.objective = replace(run.objective, teacher=teacher)
