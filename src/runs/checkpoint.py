"""A checkpoint: all that an uninterrupted run holds at this step, so that the rest of the run is the same, bit for bit.

One container holds network, quantizers, optimizer, the sums of the unfinished epoch, history, random states,
configuration and versions: tensors in its body, all else in its description. The checkpoint before it is kept and
replaces it where it is missing or damaged.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from src.runs.environment import machine, random_states, set_random_states, versions
from src.storage import Notify, StorageError, container_bytes, read_container
from src.training import EpochMeans, History, TrainingError, not_finite, pick_precision

CHECKPOINT, CHECKPOINT_BEFORE = "checkpoint.pt", "checkpoint.previous.pt"
# Settings that shape no result, so that they are never compared: where things are and what was typed. Whether the
# images are the same is what their digest says.
NOT_SHAPING = frozenset({"data", "data_root", "device", "compile", "given"})


class RunError(StorageError):
    """A run folder that cannot be used, or a checkpoint that does not belong to this run."""


@dataclass(frozen=True)
class RunProgress:
    """How far a run has come: its finished epochs, the sums of the unfinished one, and the seconds spent in that."""

    history: History
    means: EpochMeans = field(default_factory=EpochMeans)
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
            "history": progress.history.to_json(),
            "unfinished": {**vars(progress.means), "seconds": progress.seconds},
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
    path: str | Path, device: torch.device | str = "cpu", notify: Notify = warnings.warn
) -> dict[str, Any]:
    """The contents of a checkpoint, its tensors on `device`. Reading runs no code from the file.

    Where the file is missing or cannot be read, the one before it is, and `notify` (by default a warning) says so.
    Raises RunError where neither can be read.
    """
    path = Path(path)
    errors = []
    for place in (path, path.with_name(CHECKPOINT_BEFORE)):
        try:
            state = _read(place, device)
        except (StorageError, OSError) as error:
            errors.append(str(error))
            continue
        if errors:
            notify(f"NOTICE: {CHECKPOINT} is missing or damaged; reading {CHECKPOINT_BEFORE}, the one before it")
        return state
    raise RunError(f"the checkpoint cannot be read: {', and '.join(errors)}; start without --resume")


def is_readable(path: Path) -> bool:
    """Whether there is a checkpoint that is neither damaged nor of another version."""
    with suppress(StorageError, OSError):
        return bool(_read(path, "cpu"))
    return False


def contradictions(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The settings that shape a result and differ, with both values: "epochs: 20 then, 10 now".

    More epochs contradict nothing where `wanted` says that it continues the finished run.
    """
    then, now = (json.loads(json.dumps(dict(each))) for each in (saved, wanted))  # tuples become lists, as in a file
    continues = now.get("continued_from") == then.get("epochs")
    left_out = NOT_SHAPING | ({"epochs", "continued_from"} if continues else set())
    return [
        f"{name}: {then.get(name)!r} then, {now.get(name)!r} now"
        for name in sorted((then.keys() | now.keys()) - left_out)
        if then.get(name) != now.get(name)
    ]


def check_settings(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise RunError where the settings contradict those of the checkpoint."""
    if differing := contradictions(saved, wanted):
        raise RunError(
            f"the checkpoint belongs to another configuration ({'; '.join(differing)}); leave these settings out, they "
            "are taken from the checkpoint, or start without --resume"
        )


def restore(
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    data_digest: str,
    notify: Notify,
) -> RunProgress:
    """Load the contents of a checkpoint into `model`, `optimizer` and the random generators.

    Raises RunError where it belongs to another configuration, architecture or other data; nothing is changed then.
    `notify` receives a line where the last digits may differ.
    """
    check_settings(state["config"], config)
    trained_on = state["data_digest"]
    if trained_on != data_digest:
        raise RunError(
            f"the checkpoint was trained on other images or labels (digest {trained_on[:12]} then, {data_digest[:12]} "
            "now); put the data back as it was, or start without --resume"
        )
    unfinished = dict(state["unfinished"])
    seconds = unfinished.pop("seconds")
    progress = RunProgress(History.from_json(state["history"]), EpochMeans(**unfinished), seconds)
    load_model_state(model, state["model"])
    _load_optimizer(optimizer, state["optimizer"])
    set_random_states(state["random"])
    _report_differences(state, _machine(model, config), notify)
    return progress


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load parameters and buffers. Raises RunError, before changing anything, where names or shapes differ."""
    own, saved = ({name: tensor.shape for name, tensor in held.items()} for held in (model.state_dict(), state))
    differing = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
    if differing:
        raise RunError(
            f"the checkpoint is of another architecture: {len(differing)} tensors missing, unknown or of another "
            f"shape, the first {differing[0]!r}; build the same network and attach the same quantizers"
        )
    model.load_state_dict(state)


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
    state: dict[str, Any] = _with_tensors(description, {name: tensor.to(device) for name, tensor in tensors.items()})
    state["optimizer"]["state"] = {int(key): moments for key, moments in state["optimizer"]["state"].items()}
    return state


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load settings and moments, these with the strides of their parameters, which a file does not hold."""
    optimizer.load_state_dict(dict(state))
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def _machine(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    device = next(model.parameters()).device
    return machine(device, pick_precision(str(config.get("precision", "auto")), device))


def _report_differences(state: Mapping[str, Any], here: Mapping[str, Any], notify: Notify) -> None:
    """Notify of every difference that the last digits depend on."""
    then, now = {**state["versions"], **state["machine"]}, {**versions(), **here}
    differing = [
        f"{name.replace('_', ' ')} {then.get(name)} then, {now.get(name)} now"
        for name in ("torch", "numpy", "device", "device_name", "precision", "threads")
        if then.get(name) != now.get(name)
    ]
    if differing:
        notify(f"NOTICE: {'; '.join(differing)}: the last digits may differ from those of an unbroken run")
