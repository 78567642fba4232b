"""A checkpoint: all that an uninterrupted run holds at this step, so that the rest of the run is the same, bit for bit.

One container holds network, quantizers, optimizer, the sums of the unfinished epoch, history, random states,
configuration and versions: tensors in its body, all else in its description. The checkpoint before it is kept and
replaces it where it is missing or damaged.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from src.runs.environment import machine, versions
from src.runs.random_states import random_states, set_random_states
from src.storage import DamagedFileError, Notify, StorageError, container_bytes, read_container
from src.training import EpochMeans, History, TrainingError, not_finite, pick_precision

CHECKPOINT, CHECKPOINT_BEFORE, CHECKPOINT_DAMAGED = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.damaged.pt"
PARTS = ("config", "model", "optimizer", "history", "unfinished", "random")
# Settings that may differ between the two parts of a resumed run: where things are, not what is computed.
MAY_DIFFER = frozenset({"data_root", "device", "given"})


class RunError(StorageError):
    """A run folder that cannot be used, or a checkpoint that does not belong to this run."""


@dataclass(frozen=True)
class RunProgress:
    """How far a run has come: its finished epochs, the sums of the unfinished one, and the seconds spent in that."""

    history: History
    means: EpochMeans
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """The state in words: "after epoch 3 of 20", with "and 12 steps of the next" in mid-epoch."""
        steps = self.means.steps
        more = f" and {steps} step{'s' if steps > 1 else ''} of the next" if steps else ""
        return f"after epoch {len(self.history)} of {self.history.epochs}{more}"


def checkpoint_bytes(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: RunProgress,
    config: Mapping[str, Any],
    data_digest: str = "",
) -> bytes:
    """The file's contents. Raises TrainingError where a weight, buffer or optimizer state is not finite."""
    weights, updates = model.state_dict(), optimizer.state_dict()
    moments = [(f"the optimizer's {k}", t) for state in updates["state"].values() for k, t in state.items()]
    if bad := not_finite([*((f"weight {name}", t) for name, t in weights.items()), *moments]):
        raise TrainingError(
            f"{bad[0]} is not finite {progress.text}: this state is not written, the checkpoint before it stays; lower "
            "the learning rate or the peak of the penalty"
        )
    return state_bytes(
        {
            "config": dict(config),
            "data_digest": data_digest,
            "versions": versions(),
            "machine": _machine(model, config),
            "epoch": len(progress.history),
            "step": progress.means.steps,
            "model": weights,
            "optimizer": updates,
            "optimizer_class": type(optimizer).__name__,
            "history": progress.history.to_json(),
            "unfinished": {**progress.means.state(), "seconds": progress.seconds},
            "random": random_states(),
        }
    )


def state_bytes(state: Mapping[str, Any]) -> bytes:
    """The file's contents for a dictionary as `load_checkpoint` returns it: nested JSON values and tensors."""
    tensors: dict[str, Tensor] = {}
    description = {
        part: value if part == "history" else _without_tensors(value, part, tensors)  # long, and without tensors
        for part, value in state.items()
    }
    return container_bytes("checkpoint", description, safetensors.torch.save(tensors))


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu", notify: Notify | None = None
) -> dict[str, Any]:
    """The contents of a checkpoint, its tensors on `device`. Reading runs no code from the file.

    Where the file is missing or damaged the one before it is read, and `notify` (by default a warning) says so. Raises
    RunError where neither can be read, and for another version, which the one before it is of, too.
    """
    path = Path(path)
    places = [path, path.with_name(CHECKPOINT_BEFORE)] if path.name == CHECKPOINT else [path]
    existing = [place for place in places if place.exists()]
    if not existing:
        raise RunError(f"there is no checkpoint at {str(path)!r} to resume from; run without --resume first")
    errors = []
    for place in existing:
        try:
            state = _read(place, device)
        except (DamagedFileError, OSError) as error:
            errors.append(str(error))
            continue
        except StorageError as error:
            raise RunError(f"the checkpoint cannot be read: {error}; start without --resume") from error
        if place != path:
            (notify or warnings.warn)(
                f"NOTICE: {CHECKPOINT} is missing or damaged; reading {CHECKPOINT_BEFORE}, the one before it"
            )
        return state
    raise RunError(f"the checkpoint cannot be read: {', and '.join(errors)}; start without --resume")


def restore(
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    data_digest: str = "",
    notify: Notify | None = None,
) -> RunProgress:
    """Load the contents of a checkpoint into `model`, `optimizer` and the random generators.

    Raises RunError where it belongs to another configuration, architecture, optimizer or (where both digests are known)
    other data. Nothing is changed before all of that is checked. `notify` receives a line where the last digits may
    differ.
    """
    try:
        _check_config(state["config"], config)
        trained_on = str(state.get("data_digest", ""))
        if trained_on and data_digest and trained_on != data_digest:
            raise RunError(
                f"the checkpoint was trained on other images or labels (digest {trained_on[:12]} then, "
                f"{data_digest[:12]} now); put the data back as it was, or start without --resume"
            )
        check_model_state(model, state["model"])
        _check_optimizer(optimizer, state)
        unfinished = state["unfinished"]
        history = History.from_json(state["history"])
        progress = RunProgress(history, EpochMeans.from_state(unfinished), float(unfinished["seconds"]))
        set_random_states(state["random"])
    except RunError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise RunError(f"the checkpoint does not fit this run: {error}; start without --resume") from error
    _load_optimizer(optimizer, state["optimizer"])
    model.load_state_dict(state["model"])
    if notify:
        _report_differences(state, _machine(model, config), notify)
    return progress


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load parameters and buffers. Raises RunError, before changing anything, where names or shapes differ."""
    check_model_state(model, state)
    model.load_state_dict(state)


def check_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise RunError where `state` has other names or shapes than `model`."""
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    both = sorted(own.keys() & state.keys())
    reshaped = [name for name in both if own[name].shape != getattr(state[name], "shape", None)]
    if missing or unknown or reshaped:
        first = (missing or unknown or reshaped)[0]
        raise RunError(
            f"the checkpoint is of another architecture: {len(missing)} tensors missing, {len(unknown)} unknown, "
            f"{len(reshaped)} of another shape, the first {first!r}; build the same network and attach the same "
            "quantizers"
        )


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON can hold it: every tensor goes into `tensors` and leaves {"tensor": its name}."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {str(key): _without_tensors(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_without_tensors`, but for tuples and for keys that are not text."""
    if isinstance(value, dict):
        name = value.get("tensor")
        if len(value) == 1 and isinstance(name, str):
            return tensors[name]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    return [_with_tensors(item, tensors) for item in value] if isinstance(value, list) else value


def _read(path: Path, device: torch.device | str) -> dict[str, Any]:
    description, tensors = read_container(path, "checkpoint", safetensors.torch.load)
    placed = {name: tensor.to(device) for name, tensor in tensors.items()}
    absent = [name for name in PARTS if not isinstance(description.get(name), dict)]
    if absent:
        raise StorageError(f"{str(path)!r} is incomplete: no {', '.join(absent)} in it")
    try:
        state: dict[str, Any] = _with_tensors(description, placed)
        state["optimizer"]["state"] = {int(key): dict(moments) for key, moments in state["optimizer"]["state"].items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{str(path)!r} holds something else than a checkpoint ({error!r:.200})") from error
    return state


def _check_config(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(dict(wanted)))  # tuples become lists, as in a file
    differing = [
        f"{name}: {saved.get(name)!r} then, {now.get(name)!r} now"
        for name in sorted((saved.keys() | now.keys()) - MAY_DIFFER)
        if saved.get(name) != now.get(name)
    ]
    if differing:
        raise RunError(
            f"the checkpoint belongs to another configuration ({'; '.join(differing)}); repeat the settings of that "
            "run, or start without --resume"
        )


def _check_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raise RunError for the state of an optimizer of another class or with other groups of parameters."""
    own, saved = (
        [(group.get("name"), group["params"]) for group in held["param_groups"]]
        for held in (optimizer.state_dict(), state["optimizer"])
    )
    if state["optimizer_class"] != type(optimizer).__name__ or own != saved:
        raise RunError(
            "the checkpoint is of another optimizer, or of other parameters; build the same one, or start without "
            "--resume"
        )


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load settings and moments as an uninterrupted run has them, where a file holds neither tuples nor strides."""
    groups = [
        {name: tuple(value) if isinstance(own.get(name), tuple) else value for name, value in saved.items()}
        for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def _machine(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    device = next(model.parameters()).device
    return machine(device, pick_precision(str(config.get("precision", "auto")), device))


def _report_differences(state: Mapping[str, Any], here: Mapping[str, Any], notify: Notify) -> None:
    """Notify of every difference that the last digits depend on."""
    then = {**state.get("versions", {}), **state.get("machine", {})}
    now = {**versions(), **here}
    differing = [
        f"{name.replace('_', ' ')} {then.get(name)} then, {now.get(name)} now"
        for name in ("torch", "numpy", "device", "device_name", "precision", "threads")
        if then.get(name) != now.get(name)
    ]
    if differing:
        notify(f"NOTICE: {'; '.join(differing)}: the last digits may differ from those of an unbroken run")
