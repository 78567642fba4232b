"""Before training: are the penalty's groups those of removable channels? Tested by intervention. Axis: G groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.doctor.network.network_checks import batch_of, scores_of
from experiments.doctor.observe import grouping_of, perturb_
from experiments.doctor.pipeline import Pipeline
from experiments.doctor.reference.objective import Grouping, parameter_name
from experiments.doctor.runner import CheckRunner, NotApplicable, Outcome, names, preserve_state
from utils_quantization import eval_mode


def channel_group_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Add the finding about the groups."""
    runner.check("channel groups", "zeroing a group makes its channel zero for all who read it", _groups, pipeline)


def _groups(pipeline: Pipeline) -> Outcome:
    """Zero everything that makes the channels of random groups; those who read them must see zeros there."""
    if pipeline.expected.penalty is None:
        raise NotApplicable("no penalty on channel groups is expected")
    grouping = grouping_of(pipeline)
    images, _ = batch_of(pipeline, 8)
    random = np.random.default_rng(0)
    wrong: set[str] = set()
    with preserve_state(pipeline):
        perturb_(pipeline)
        pipeline.model.eval()
        for _ in range(4):
            chosen = random.random(grouping.count) < 0.5
            with preserve_state(pipeline):
                wrong |= _intervene(pipeline, grouping, chosen, images)
    uncovered = _uncovered(pipeline, grouping)
    measured = f"{grouping.count} groups hold" if not wrong else f"not zero where {names(sorted(wrong))} read them"
    measured += f"; in no group: channels of {names(uncovered)}" if uncovered else ""
    likely = ["penalty-ignores-shortcut", "penalty-groups-shifted", "penalty-wrong"]
    return Outcome("zero at every reader", measured, not wrong and not uncovered, likely)


def _intervene(pipeline: Pipeline, grouping: Grouping, chosen: np.ndarray, images: Tensor) -> set[str]:
    """Modules that read something else than zero from the channels of the chosen groups."""
    model = pipeline.model
    with torch.no_grad():
        for member in grouping.members:
            if member.role != "slice":
                p = model.get_parameter(parameter_name(model, member.module, member.parameter))
                rows = torch.from_numpy(np.flatnonzero((member.groups >= 0) & chosen[member.groups]))
                p.index_fill_(member.dim, rows.to(p.device), 0.0)
    seen: dict[str, Tensor] = {}
    hooks = []
    for member in grouping.members:
        if member.role == "slice":
            hooks.append(model.get_submodule(member.module).register_forward_pre_hook(_keeper(seen, member.module)))
    try:
        with eval_mode(model):
            scores_of(pipeline, images)
    finally:
        for hook in hooks:
            hook.remove()
    wrong = set()
    for member in grouping.members:
        if member.role == "slice" and member.module in seen:
            read = np.flatnonzero((member.groups >= 0) & chosen[member.groups])
            if bool((seen[member.module][torch.from_numpy(read)] > 0).any()):
                wrong.add(member.module)
    return wrong


def _keeper(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any], None]:
    def keep(module: nn.Module, inputs: Any) -> None:
        x = inputs[0].detach().abs().cpu()
        seen[name] = x.transpose(0, 1).flatten(1).amax(1)

    return keep


def _uncovered(pipeline: Pipeline, grouping: Grouping) -> list[str]:
    """Convolutions with output channels in no group."""
    whole = {m.module for m in grouping.members if m.role == "filter" and (m.groups >= 0).all()}
    return [n for n, m in pipeline.model.named_modules() if isinstance(m, nn.Conv2d) and n not in whole]
