"""Run checks one after another. A check that raises is itself a finding, and the next one goes on."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.doctor.causes.catalogue import CAUSES, OF_QUANTIZERS, causes
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.report import FAILED, NOT_JUDGED, PASSED, UNUSUAL, Finding, Report
from utils_quantization import quantized_layers

RAISED = (Exception, SystemExit)
"""What a part of somebody's pipeline may raise; an interruption by the user goes on up."""


class NotApplicable(Exception):
    """A check needs something that this pipeline does not have; the message says what.

    needs: the field that would let it look, one of `report.SUBJECTS`; empty where no field would.
    """

    def __init__(self, reason: str, needs: str = "") -> None:
        super().__init__(reason)
        self.needs = needs


class PartFailed(Exception):
    """A part of the pipeline raised an error; `cause` is the key of the cause."""

    def __init__(self, cause: str, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.cause = cause


@dataclass(frozen=True)
class Outcome:
    """What a check found. likely: keys of causes, most likely first, where `ok` is False.

    unusual: where `ok` is False, this is legal as far as is known, because the intention is open.
    """

    expected: str
    measured: str
    ok: bool
    likely: Sequence[str | None] = ()
    error: float = 0.0
    unusual: bool = False


class CheckRunner:
    """The findings of one stage. Without quantizers, and where none are expected, no cause speaks of them."""

    def __init__(self, stage: str, pipeline: Pipeline) -> None:
        self.stage = stage
        expects = pipeline.expected.quantized or pipeline.expected.quantizer
        quantizers = bool(expects or quantized_layers(pipeline.model))
        self._thinkable = frozenset(CAUSES) if quantizers else frozenset(CAUSES) - OF_QUANTIZERS
        self.findings: list[Finding] = []

    def check(
        self, name: str, proves: str, run: Callable[..., Outcome], *arguments: Any, blame: str = "model-raises"
    ) -> None:
        """Add the finding of `run(*arguments)`; `blame`: cause where it raises an error of its own."""
        try:
            out = run(*arguments)
        except NotApplicable as reason:
            self.findings.append(Finding(name, proves, self.stage, "", str(reason), NOT_JUDGED, needs=reason.needs))
            return
        except PartFailed as broken:
            self.add(name, proves, Outcome("no error", _short(str(broken)), False, [broken.cause]))
            return
        except RAISED as error:  # whatever a user's part raises is a finding
            text = _short(f"{type(error).__name__}: {error}")
            self.add(name, proves, Outcome("no error", text, False, [_why(error, blame)]))
            return
        self.add(name, proves, out)

    def add(self, name: str, proves: str, out: Outcome) -> None:
        """Add what a check found; causes that the catalogue does not know, or that cannot be, are dropped."""
        likely = () if out.ok else causes(*(key for key in out.likely if key in self._thinkable))
        status = PASSED if out.ok else UNUSUAL if out.unusual else FAILED
        self.findings.append(Finding(name, proves, self.stage, out.expected, out.measured, status, likely, out.error))

    def report(self) -> Report:
        """All findings so far."""
        return Report(tuple(self.findings))


@contextmanager
def preserve_state(pipeline: Pipeline) -> Iterator[None]:
    """Afterwards parameters, buffers, gradients, modes, optimizer, schedulers and random numbers are what they were
    before, bit for bit, also after an exception."""
    restore = [_keep_random_numbers(), _keep_model(pipeline.model), _keep_optimizer(pipeline.optimizer, pipeline.model)]
    states = [(scheduler, copy.deepcopy(scheduler.state_dict())) for scheduler in pipeline.schedulers]
    restore += [functools.partial(scheduler.load_state_dict, state) for scheduler, state in states]
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


def reseed(seed: int) -> None:
    """Other random numbers from here on, from every generator that a pipeline may draw from; use `preserve_state`."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def _keep_random_numbers() -> Callable[[], None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def put_back() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return put_back


def _keep_model(model: nn.Module) -> Callable[[], None]:
    """Tensors by value, and by identity where a module holds them; flags and numbers of every module by value."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    held = [(m, dict(m._modules), dict(m._parameters), dict(m._buffers), _flags(m)) for m in model.modules()]

    @torch.no_grad()
    def put_back() -> None:
        for module, inside, parameters, buffers, flags in held:
            module._modules.clear()
            module._modules.update(inside)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
            for name, value in flags.items():
                if module.__dict__.get(name) is not value:
                    module.__dict__[name] = value
        for name, tensor in tensors.items():
            if tensor.is_meta or torch.equal(tensor, values[name]):
                continue
            if tensor.shape != values[name].shape:  # an observer's, which takes the size of what it first sees
                tensor.resize_(values[name].shape)
            tensor.copy_(values[name])
        for name, p in model.named_parameters():
            p.requires_grad_(learns[name])
            p.grad = gradients[name]

    return put_back


def _flags(module: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in module.__dict__.items() if isinstance(value, plain)}


def _keep_optimizer(optimizer: Any, model: nn.Module) -> Callable[[], None]:
    parameters = {id(p): p for p in model.parameters()}
    if not isinstance(optimizer, torch.optim.Optimizer):
        # Not torch's: all it holds is copied, its parameters are not.
        kept = copy_except(getattr(optimizer, "__dict__", {}), parameters)

        def put_all_back() -> None:
            if kept:
                optimizer.__dict__.clear()
                optimizer.__dict__.update(kept)

        return put_all_back
    parameters |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
    state = {p: copy_except(entry, parameters) for p, entry in optimizer.state.items()}
    groups = [
        (group, list(group["params"]), {k: v for k, v in group.items() if k != "params"})
        for group in optimizer.param_groups
    ]
    rates = [[v.clone() if isinstance(v, Tensor) else v for v in settings.values()] for _, _, settings in groups]

    def put_back() -> None:
        optimizer.state.clear()
        optimizer.state.update(state)
        optimizer.param_groups[:] = [group for group, _, _ in groups]
        for (group, members, settings), values in zip(groups, rates, strict=True):
            group.clear()
            group["params"] = members
            group.update(dict(zip(settings, values, strict=True)))

    return put_back


def copy_except(thing: Any, kept: dict[int, Any]) -> Any:
    """A deep copy in which the objects of `kept` (by id) stay themselves."""
    return copy.deepcopy(thing, dict(kept))


def _why(error: BaseException, blame: str) -> str:
    """The cause of an error: torch says in its message where tensors lie on different devices, or on none."""
    elsewhere = any(words in str(error).lower() for words in ("meta tensor", "same device"))
    return "device-mismatch" if elsewhere else blame


def _short(text: str, most: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def names(found: Sequence[str], most: int = 3) -> str:
    """The first names and how many more there are."""
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
