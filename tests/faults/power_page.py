"""docs/measured/doctor.md: what the doctor caught, as tables. Text from outcomes, nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tests.faults import THEMES
from tests.faults.foreign import FOREIGN

if TYPE_CHECKING:
    from tests.faults.power import Outcome

STAGES = ("before training", "first steps", "while training", "afterwards")
LETTERS = dict(zip(STAGES, "BFTA", strict=True))

INTRODUCTION = """# What the doctor caught

Written by `make doctor-power`. Every fault is built into the pipeline alone, and its examination stops at the first
stage that finds something; faults in measuring and saving, and all that is healthy, see every stage.
[../doctor.md](../doctor.md) says how the doctor works.
"""


def page(outcomes: Sequence[Outcome], data: Sequence[str]) -> str:
    """The page as Markdown."""
    faults = [outcome for outcome in outcomes if outcome.kind == "fault"]
    healthy = [outcome for outcome in outcomes if outcome.kind == "healthy"]
    foreign = [outcome for outcome in outcomes if outcome.kind == "foreign"]
    codes = _codes(outcomes)
    parts = [
        INTRODUCTION,
        _summary(faults, healthy, foreign, data),
        _faults(faults, codes),
        _checks(faults, [*healthy, *foreign], codes),
        _healthy(healthy),
        _foreign(foreign),
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


def _summary(
    faults: Sequence[Outcome], healthy: Sequence[Outcome], foreign: Sequence[Outcome], data: Sequence[str]
) -> str:
    caught, named = sum(o.caught for o in faults), sum(o.good for o in faults)
    alarms = sum(o.caught for o in healthy)
    lines = [
        "## Result",
        "",
        f"- {caught} of {len(faults)} faults caught, {named} of {len(faults)} with the right cause among the first two",
        f"- {alarms} false alarms in {len(healthy)} healthy runs, {sum(o.judged for o in healthy):,} checks judged",
        f"- {sum(o.caught for o in foreign)} false alarms in {len(foreign)} healthy pipelines of other forms",
    ]
    if "cifar10" not in data:
        lines.append("- CIFAR-10 was not under data/, so the healthy runs on it were skipped")
    return "\n".join(lines)


def _faults(faults: Sequence[Outcome], codes: dict[tuple[str, str], str]) -> str:
    found = {outcome.name: outcome for outcome in faults}
    lines = ["## Fault x check", ""]
    lines += [
        "Fired: the checks that failed, by the code of the table below. Cause: the first that the doctor names; where",
        "the right one is its second, both. The key's sentence and remedy are in `experiments/doctor/causes/`.",
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


def _foreign(foreign: Sequence[Outcome]) -> str:
    lines = [
        "## Healthy pipelines of other forms",
        "",
        "Unusual: what the doctor remarks on and does not call wrong.",
        "",
    ]
    lines += _header("pipeline", "what it is", "checks judged", "unusual", "false alarms")
    for outcome in foreign:
        said = ", ".join(outcome.unusual) or "nothing"
        lines.append(_row(outcome.name, FOREIGN[outcome.name].what, _judged([outcome]), said, str(int(outcome.caught))))
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
