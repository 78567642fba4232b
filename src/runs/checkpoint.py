"""A checkpoint: all that an unbroken run would hold at this step, so that the rest of the run is the same, bit for bit.

One file holds network, quantizers, optimizer, the unfinished epoch's sums, history, random states, configuration and
versions. It is read without running code from it, and its checksums are looked at. The checkpoint before it is kept
beside it and takes its place where it is missing or damaged.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.runs.environment import machine, versions
from src.runs.random_states import random_states, set_random_states
from src.storage import RunError, load_checked
from src.training import EpochMeans, History, TrainingError, not_finite, pick_precision

CHECKPOINT_FORMAT = 2
CHECKPOINT_PARTS = ("config", "model", "optimizer", "history", "unfinished", "random")
CHECKPOINT, CHECKPOINT_BEFORE, CHECKPOINT_DAMAGED = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.damaged.pt"
# Settings that may differ between the two parts of a resumed run: where things are, not what is computed.
MAY_DIFFER = frozenset({"data_root", "device", "given"})
# What contents of another form than expected can raise where they are looked at.
MISFITS = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError)
Report = Callable[[str], None]


class DamagedCheckpoint(RunError):
    """A checkpoint file that is missing, cut, or changed since it was written."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come: its finished epochs, the sums of the unfinished one, and the seconds spent in that."""

    history: History
    means: EpochMeans
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """Where it stands: "after epoch 3 of 20", with "and 12 steps of the next" in mid-epoch."""
        steps = self.means.steps
        more = f" and {steps} step{'s' if steps > 1 else ''} of the next" if steps else ""
        return f"after epoch {len(self.history)} of {self.history.epochs}{more}"


def checkpoint_bytes(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: Mapping[str, Any],
    data_digest: str = "",
) -> bytes:
    """The file. Raises TrainingError where a weight, buffer or optimizer state is not finite: no such state is kept."""
    weights, updates = model.state_dict(), optimizer.state_dict()
    moments = [(f"the optimizer's {k}", t) for state in updates["state"].values() for k, t in state.items()]
    if bad := not_finite([*((f"weight {name}", t) for name, t in weights.items()), *moments]):
        raise TrainingError(
            f"{bad[0]} is not finite {progress.text}: this state is not written, the checkpoint before it stays; lower "
            "the learning rate or the peak of the penalty"
        )
    state = {
        "format": CHECKPOINT_FORMAT,
        "config": dict(config),
        "data_digest": data_digest,
        "versions": versions(),
        "machine": _machine(model, config),
        "epoch": len(progress.history),
        "step": progress.means.steps,
        "model": weights,
        "optimizer": updates,
        "history": progress.history.to_json(),
        "unfinished": {**progress.means.state(), "seconds": progress.seconds},
        "random": random_states(),
    }
    buffer = BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu", report: Report | None = None
) -> dict[str, Any]:
    """The contents of a checkpoint, read without running any code from it (`weights_only`).

    Where the file is missing or damaged the one before it is read, and `report` (by default a warning) says so. Raises
    RunError where neither can be read, and for another format, which the one before it would have, too.
    """
    path = Path(path)
    try:
        return _read(path, device)
    except DamagedCheckpoint as error:
        before = path.with_name(CHECKPOINT_BEFORE)
        if path.name != CHECKPOINT or not before.exists():
            raise
        try:
            state = _read(before, device)
        except DamagedCheckpoint as second:
            raise DamagedCheckpoint(f"{error}; {CHECKPOINT_BEFORE} cannot be read either") from second
        notice = f"NOTICE: {CHECKPOINT} is missing or damaged; reading {CHECKPOINT_BEFORE}, the one before it"
        (report or warnings.warn)(notice)
        return state


def restore(
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    data_digest: str = "",
    report: Report | None = None,
) -> Progress:
    """Load the contents of a checkpoint into `model`, `optimizer` and the random generators.

    Raises RunError where it belongs to another configuration, architecture or (where both digests are known) other
    data. Nothing is changed before all of that is checked. `report` hears where exactness cannot be promised.
    """
    try:
        _check_same(state["config"], config)
        _check_data(str(state.get("data_digest", "")), data_digest)
        check_model_state(model, state["model"])
        _check_updates(optimizer, state["optimizer"])
        unfinished = state["unfinished"]
        history = History.from_json(state["history"])
        progress = Progress(history, EpochMeans.from_state(unfinished), float(unfinished["seconds"]))
        set_random_states(state["random"])
    except RunError:
        raise
    except MISFITS as error:
        raise RunError(f"the checkpoint does not fit this run: {error}; start without --resume") from error
    optimizer.load_state_dict(state["optimizer"])
    model.load_state_dict(state["model"])
    if report:
        _report_differences(state, _machine(model, config), report)
    return progress


def load_model_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load parameters and buffers. Raises RunError, before changing anything, where names or shapes differ."""
    check_model_state(model, state)
    model.load_state_dict(state)


def check_model_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Raise RunError where `state` has other names or shapes than `model`."""
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(map(str, state.keys() - own.keys()))
    both = sorted(own.keys() & state.keys())
    reshaped = [name for name in both if own[name].shape != getattr(state[name], "shape", None)]
    if missing or unknown or reshaped:
        first = (missing or unknown or reshaped)[0]
        raise RunError(
            f"the checkpoint is of another architecture: {len(missing)} tensors missing, {len(unknown)} unknown, "
            f"{len(reshaped)} of another shape, the first {first!r}; build the same network and attach the same "
            "quantizers"
        )


def _read(path: Path, device: torch.device | str) -> dict[str, Any]:
    if not path.exists():
        raise DamagedCheckpoint(f"there is no checkpoint at {str(path)!r} to resume from; run without --resume first")
    try:
        state = load_checked(path, device)
    except Exception as error:  # a damaged file makes the reader fail in many ways; all mean the same here
        raise DamagedCheckpoint(
            f"checkpoint {str(path)!r} cannot be read ({type(error).__name__}): it is damaged or not a checkpoint; "
            "start without --resume"
        ) from error
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise RunError(
            f"checkpoint {str(path)!r} has format {found!r}, this version reads {CHECKPOINT_FORMAT}; start without "
            "--resume"
        )
    absent = [name for name in CHECKPOINT_PARTS if not isinstance(state.get(name), dict)]
    if absent:
        raise RunError(f"checkpoint {str(path)!r} is incomplete: no {', '.join(absent)} in it; start without --resume")
    return state


def _check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(dict(wanted)))  # tuples become lists, as in a file
    before = json.loads(json.dumps(dict(saved)))
    names = sorted((before.keys() | plain.keys()) - MAY_DIFFER)
    differing = [
        f"{name}: {before.get(name)!r} then, {plain.get(name)!r} now"
        for name in names
        if before.get(name) != plain.get(name)
    ]
    if differing:
        raise RunError(
            f"the checkpoint belongs to another configuration ({'; '.join(differing)}); repeat the settings of that "
            "run, or start without --resume"
        )


def _check_data(before: str, now: str) -> None:
    if before and now and before != now:
        raise RunError(
            f"the checkpoint was trained on other images or labels (digest {before[:12]} then, {now[:12]} now); "
            "put the data back as it was, or start without --resume"
        )


def _check_updates(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raise RunError for the state of an optimizer of another kind, with other groups, or of other parameters.

    torch's own check counts parameters and groups, and would take over settings that this kind does not have.
    """
    own, saved = optimizer.state_dict()["param_groups"], state["param_groups"]
    members = [[(group.get("name"), group["params"]) for group in groups] for groups in (own, saved)]
    other_kind = members[0] != members[1] or any(map(_of_another_kind, own, saved))
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    strange = [
        f"{name} of parameter {number}"
        for number, moments in ({} if other_kind else state["state"]).items()
        for name, moment in moments.items()
        if moment.shape not in (shapes[number], torch.Size())
    ]
    if other_kind or strange:
        raise RunError(
            "the checkpoint is of another optimizer, or of other parameters"
            f"{f' ({strange[0]})' if strange else ''}; build the same one, or start without --resume"
        )


def _of_another_kind(group: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Whether a group's settings are of different types, or each has one that the other lacks.

    A version of torch that has one more setting than the other is still the same kind.
    """
    lacking = group.keys() - saved.keys() and saved.keys() - group.keys()
    return bool(lacking) or any(type(group[name]) is not type(saved[name]) for name in group.keys() & saved.keys())


def _machine(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    device = next(model.parameters()).device
    return machine(device, pick_precision(str(config.get("precision", "auto")), device))


def _report_differences(state: Mapping[str, Any], here: Mapping[str, Any], report: Report) -> None:
    """What the last digits depend on, where it is not what it was."""
    then = {**state.get("versions", {}), **state.get("machine", {})}
    now = {**versions(), **here}
    shaping = ("torch", "numpy", "device", "device_name", "precision", "threads")
    differing = [
        f"{name.replace('_', ' ')} {then.get(name)} then, {now.get(name)} now"
        for name in shaping
        if then.get(name) != now.get(name)
    ]
    if differing:
        report(f"NOTICE: {'; '.join(differing)}: the last digits may differ from those of an unbroken run")
