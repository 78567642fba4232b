"""Which run `experiments.lab` explores: whether a folder holds one that the notebook can take up, and with what.

A finished run can be taken up where the notebook's parameters describe it completely: preset, data, epochs, batch
size, limit, seed. One made with other settings, such as a peak of its own, cannot, and is explored with
`explorers.load_run` instead.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.pipeline import PRESETS, ConfigError, RunConfig, SavedRun, configure, contents
from src.runs import CHECKPOINT, SUMMARY, RunError, RunFolder
from src.storage import log_info

# Parameters of the notebook and the settings that they stand for; those equal to the preset's are left out.
NAMES = {"EPOCHS": "epochs", "BATCH_SIZE": "batch_size", "LIMIT": "limit", "SEED": "seed"}
NOT_COMPARED = frozenset({"data_root", "device", "given"})  # where things are, not what is computed


class LabRunError(ValueError):
    """The folder holds no run that the notebook can take up."""


def explorable(folder: Path) -> dict[str, Any]:
    """The notebook's parameters that take up the finished run in `folder`. Raises LabRunError where that cannot be."""
    for name, there in ((CHECKPOINT, RunFolder(folder).has_checkpoint()), (SUMMARY, (folder / SUMMARY).is_file())):
        if not there:
            raise LabRunError(f"{str(folder)!r} holds no finished run: {contents(folder)}; need {name}")
    try:
        saved = SavedRun.open(folder)
    except RunError as error:
        raise LabRunError(str(error)) from error
    config, done = saved.config, len(saved.history)
    if done != config.epochs:
        raise LabRunError(f"the run in {str(folder)!r} stopped after {done} of {config.epochs} epochs: finish it first")
    return {**_parameters(config), "OUTPUT_DIR": folder.as_posix(), "RESUME": True}


def training_command(folder: Path) -> list[str]:
    """The command line that trains the short run into `folder`, or goes on with one that was interrupted; says so."""
    command = [sys.executable, "-m", "experiments.debug_run", "--data", "digits", "--output", str(folder)]
    if RunFolder(folder).has_checkpoint() and not (folder / SUMMARY).is_file():
        log_info(f"going on with the training in {folder} (about a minute in all) ...")
        return [*command, "--resume"]
    log_info(f"no trained run yet: training a short one on the embedded digits into {folder}, about a minute ...")
    return command


def _parameters(config: RunConfig) -> dict[str, Any]:
    preset = PRESETS.get(config.preset)
    if preset is None:
        raise LabRunError(f"the run's preset {config.preset!r} is not one of this version: {', '.join(PRESETS)}")
    given = {name: getattr(config, field) for name, field in NAMES.items()}
    given = {name: value for name, value in given.items() if value != getattr(preset, NAMES[name])}
    parameters = {"PRESET": config.preset, "DATA": config.data, "DATA_ROOT": config.data_root, **given}
    try:
        rebuilt = asdict(
            configure(
                config.preset,
                data=config.data,
                data_root=config.data_root,
                **{NAMES[name]: value for name, value in given.items()},
            )
        )
    except ConfigError as error:
        raise LabRunError(str(error)) from error
    other = sorted(name for name, value in asdict(config).items() if value != rebuilt[name])
    if other := [name for name in other if name not in NOT_COMPARED]:
        raise LabRunError(
            f"the run has settings that the notebook has no parameter for ({', '.join(other)}): explore it in a cell "
            "with explorers.load_run, or name another folder with --output"
        )
    return parameters
