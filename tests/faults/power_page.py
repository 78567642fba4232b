"""docs/doctor.md: how the doctor works, what it caught, and what it cannot see. Text from outcomes, nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tests.faults import THEMES

if TYPE_CHECKING:
    from tests.faults.power import Outcome

STAGES = ("before training", "first steps", "while training", "afterwards")
LETTERS = dict(zip(STAGES, "BFTA", strict=True))

INTRODUCTION = """# The doctor

A picture that goes up convinces until somebody attaches nine quantizers instead of eighteen. The doctor
(`experiments/doctor.py`) examines a training pipeline in four stages and names the most likely cause of what it finds:

- **before training**: what is attached and what is left out, what the optimizer holds, the data, the loss at the start,
  and every quantizer against its equations, values and gradients;
- **first steps**: one step replayed by hand (loss, gradients, update), what a step changes, the penalty's gradient in
  every group, one batch overfitted;
- **while training**: loss, accuracy, schedule and logits, epoch by epoch; and one step of every epoch taken apart on a
  copy of the network: its loss, gradient and update are still the expected ones;
- **afterwards**: every reported figure computed a second way from the saved checkpoint.

It reaches a pipeline through replaceable parts alone (`Pipeline`: model, optimizer, step, loaders, measuring, saving),
so it examines anybody's pipeline in the same way, and a part that is absent makes its checks "not applicable". A second
computation never calls the function it judges.

    python -m experiments.doctor                       # a run of its own on the embedded digits
    python -m experiments.doctor --run debug_output    # a finished run: its figures a second time
    python -m experiments.debug_run --doctor           # a run that trains anyway, from the first step on

This page measures it. `make doctor-power` breaks the pipeline in {faults} ways, one at a time, through the same seams
(`tests/faults/`), and runs it unbroken {healthy} times; the examination is always of all four stages. The network is
one block a stage at half the width, so that a run takes seconds.
"""

OWN_PIPELINE = """## A pipeline of your own

Any model, optimizer, loader and step function. What is not handed over is not examined, and a part that raises is a
finding. `expected` says what is meant; without it nothing is compared with it. `examine` runs all stages,
`before` and `first_steps` are the two that need no training; the pipeline is afterwards as it was.

```python
import torch
from torch import nn

from experiments.doctor import Expected, Pipeline, before, first_steps
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers

model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 3))
attach_weight_quantizers(model, ["4"], DeadZoneLDZCompander)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
batches = [(torch.randn(24, 1, 8, 8), torch.arange(24) % 3) for _ in range(4)]


def step(images, labels):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


own = Pipeline.of_parts(model, optimizer, batches, step, expected=Expected(num_classes=3, input_size=(1, 8, 8)))
report = before(own) + first_steps(own)
print(report.text())
```
"""

LIMITS = """## What it cannot see

- **A wrong expectation.** The doctor compares with the configuration. A peak that is too high for a dataset,
  a delay that was mistyped or bits that were never wanted are what was asked for; the verdict of a long run tells.
- **What changes nothing.** With AdamW a loss or a gradient multiplied by a constant moves weights as before; it is seen
  in the reported loss or in the replayed step only. A quantizer whose |tanh| lost its absolute value is the same
  quantizer while its logits are positive: the equations are probed with negative logits as well, a checkpoint is not.
- **Labels that are wrong in both parts in the same way, in data of your own.** If every cat is called dog in training
  and test alike, nothing disagrees with anything. The same holds for red and blue exchanged in both.
- **Few wrong labels in data of your own.** A per cent of wrong labels lies within what a small network gets wrong
  anyway; the labels of CIFAR-10 and of the digits are read again from their source.
- **Test images that are nearly, not exactly, training images.** Duplicates are found by their bytes; the same scene
  photographed twice is not.
- **What depends on the machine.** Nondeterminism between devices, a driver's rounding, or a race on a GPU shows only
  where it changes an evaluation that is repeated at once.
- **Slowness and memory.** They are the benchmark's affair (`make bench`).
- **A step that nobody took apart.** One step of every epoch is computed a second time; what goes wrong in other steps
  alone shows only if records, schedule or figures then disagree. Where the loader does not give the same batch when
  asked again, only modes and updates are compared.
- **Less than a check tolerates.** A loss is compared to 0.1 %, a gradient to 2 %: a loss in half precision, off by
  0.04 %, passes.
- **A network that is wrong in its baseline, too.** What lies between the layers is compared with the baseline alone.
"""


def page(outcomes: Sequence[Outcome], data: Sequence[str]) -> str:
    """The page as Markdown."""
    faults = [outcome for outcome in outcomes if outcome.kind == "fault"]
    healthy = [outcome for outcome in outcomes if outcome.kind == "healthy"]
    codes = _codes(outcomes)
    parts = [
        INTRODUCTION.format(faults=len(faults), healthy=len(healthy)),
        _summary(faults, healthy, data),
        _faults(faults, codes),
        _checks(faults, healthy, codes),
        _healthy(healthy),
        OWN_PIPELINE,
        LIMITS,
    ]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _codes(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], str]:
    """B1, B2 ... F1 ...: a short name for every check, in the order of the examination."""
    known = dict.fromkeys(check for outcome in outcomes for check in outcome.checks)
    codes: dict[tuple[str, str], str] = {}
    for stage in STAGES:
        of_stage = [check for check in known if check[0] == stage]
        codes |= {check: f"{LETTERS[stage]}{number}" for number, check in enumerate(of_stage, 1)}
    return codes


def _summary(faults: Sequence[Outcome], healthy: Sequence[Outcome], data: Sequence[str]) -> str:
    caught, named = sum(o.caught for o in faults), sum(o.good for o in faults)
    alarms = sum(o.caught for o in healthy)
    lines = [
        "## Result",
        "",
        f"- {caught} of {len(faults)} faults caught, {named} of {len(faults)} with the right cause among the first two",
        f"- {alarms} false alarms in {len(healthy)} healthy runs, {sum(o.judged for o in healthy):,} checks judged",
    ]
    if "cifar10" not in data:
        lines.append("- CIFAR-10 was not under data/, so the healthy runs on it were skipped")
    return "\n".join(lines)


def _faults(faults: Sequence[Outcome], codes: dict[tuple[str, str], str]) -> str:
    found = {outcome.name: outcome for outcome in faults}
    lines = ["## Fault x check", ""]
    lines += [
        "Fired: the checks that failed, by the code of the table below. Cause: the first that the doctor names; where",
        "the right one is its second, both. The key's sentence and remedy are in `experiments/diagnosis/causes.py`.",
    ]
    for theme, members in THEMES.items():
        lines += ["", f"### {theme.capitalize()}", ""]
        lines += _header("fault", "what it breaks", "fired", "cause named", "right cause in the first two")
        for fault in members:
            if fault.name not in found:
                continue
            outcome = found[fault.name]
            fired = [codes[(stage, check)] for stage, check, _ in outcome.fired]
            first = outcome.causes[:1] if set(fault.causes) & set(outcome.causes[:1]) else outcome.causes[:2]
            lines.append(
                _row(fault.name, fault.breaks, _listing(fired), ", ".join(first) or "none", _yes(outcome.good))
            )
    return "\n".join(lines)


def _checks(faults: Sequence[Outcome], healthy: Sequence[Outcome], codes: dict[tuple[str, str], str]) -> str:
    fired = Counter((stage, check) for outcome in faults for stage, check, _ in outcome.fired)
    first = Counter(outcome.fired[0][:2] for outcome in faults if outcome.fired)
    alarms = Counter((stage, check) for outcome in healthy for stage, check, _ in outcome.fired)
    lines = ["## Checks", "", "How many of the faults each check fired on, and how many it found first.", ""]
    lines += _header("code", "stage", "check", "fired on", "first on", "false alarms")
    for check, code in codes.items():
        lines.append(_row(code, check[0], check[1], str(fired[check]), str(first[check]), str(alarms[check])))
    return "\n".join(lines)


def _healthy(healthy: Sequence[Outcome]) -> str:
    lines = ["## Healthy runs", ""]
    lines += _header("data", "bits", "squared logits", "arithmetic", "runs", "checks judged", "false alarms")
    plain = {"data", "learnable_bit", "regularization", "seed", "precision"}
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    others = []
    for outcome in healthy:
        given = dict(outcome.settings)
        if not {"data", "learnable_bit", "regularization"} <= given.keys() <= plain:
            others.append(outcome)
            continue
        name = "CIFAR-10 subset" if given["data"] == "cifar10" else "digits"
        bits = "learned" if given["learnable_bit"] else "4, fixed"
        form = "in the loss" if given["regularization"] == "loss" else "decoupled decay"
        arithmetic = "bfloat16" if given.get("precision") == "bf16" else "float32"
        groups.setdefault((name, bits, form, arithmetic), []).append(outcome)
    for key, members in groups.items():
        lines.append(_row(*key, str(len(members)), _judged(members), str(sum(o.caught for o in members))))
    lines += ["", "And one run each on the digits with other settings:", ""]
    lines += _header("settings", "checks judged", "false alarms")
    lines += [_row(f"`{outcome.name}`", _judged([outcome]), str(int(outcome.caught))) for outcome in others]
    return "\n".join(lines)


def _judged(outcomes: Iterable[Outcome]) -> str:
    return f"{sum(outcome.judged for outcome in outcomes):,}"


def _header(*names: str) -> list[str]:
    return [_row(*names), "|" + " --- |" * len(names)]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _listing(codes: Sequence[str]) -> str:
    return " ".join(codes) if codes else "none"


def _yes(good: bool) -> str:
    return "yes" if good else "**no**"
