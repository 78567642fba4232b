"""Measure the doctor's power on every fault, on healthy runs of every kind and on healthy pipelines of other forms.

    python -m tests.faults.power [--workers 2] [--seeds 10] [--only TEXT] [--again TEXT]

The examination of a fault stops, as a user's would, at the first stage that finds something; of faults in measuring
and saving, and of all that is healthy, every stage is run. Writes docs/measured/doctor.md and the raw findings to
build/doctor_power.json. Exit status: 0 where every fault is caught with its right cause among the first two and nothing
healthy fails, otherwise 1. With `--only`, what holds TEXT in its name ("fault: ...", "healthy: ...", "foreign: ...") is
examined and printed, and nothing is written. With `--again` its outcomes replace those that the last whole run left in
build/, and the page is written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from experiments.notebook.demonstration import broken, edited
from tests.faults import FAULTS, THEMES, healthy, small_config
from tests.faults.foreign import FOREIGN
from tests.faults.power_page import page

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "build" / "doctor_power.json", ROOT / "docs" / "measured" / "doctor.md"
CIFAR10 = ROOT / "data" / "cifar-10-batches-py"


@dataclass(frozen=True)
class Case:
    """One run to examine. kind: "fault", "healthy" or "foreign" (healthy, too); settings: of `small_config`."""

    kind: str
    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What the doctor said. fired: (stage, check, first two cause keys) of every failed check, in its order.

    causes: keys of the doctor's likely causes over all checks, most likely first. checks: all that were made, with
    their stages; judged: those of them that applied.
    """

    kind: str
    name: str
    settings: Mapping[str, Any]
    fired: tuple[tuple[str, str, tuple[str, ...]], ...]
    causes: tuple[str, ...]
    checks: tuple[tuple[str, str], ...]
    judged: int
    unusual: tuple[str, ...]
    said: tuple[str, ...]

    @property
    def caught(self) -> bool:
        return bool(self.fired)

    @property
    def named(self) -> bool:
        """Whether one of the fault's causes is among the doctor's first two."""
        return bool(set(FAULTS[self.name].causes) & set(self.causes[:2]))

    @property
    def good(self) -> bool:
        return self.caught and self.named if self.kind == "fault" else not self.caught


def fault_cases() -> list[Case]:
    return [Case("fault", name, {}) for name in FAULTS]


def healthy_cases(seeds: int, data: Sequence[str]) -> list[Case]:
    """Seeds x data x (learned, fixed bits) x (squares in the loss, decoupled decay), and what else a run can be."""
    cases = []
    for source, learned, form, seed in product(data, (True, False), ("loss", "decoupled"), range(seeds)):
        settings = {"data": source, "learnable_bit": learned, "regularization": form, "seed": seed}
        if seed % 5 == 4:  # every fifth in bfloat16, which the processor may have to emulate
            settings["precision"] = "bf16"
        cases.append(Case("healthy", _name(settings), settings))
    return cases + [Case("healthy", _name(settings), settings) for settings in VARIANTS]


VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"peak": 0.0},
    {"learnable_deadzone": False},
    {"learnable_deadzone": False, "learnable_bit": False},
    {"max_bits": 4},
    {"learnable_bit": False, "fixed_bits": 2},
    {"init_bit_logit": -3.0, "init_deadzone_logit": -3.0},
    {"init_bit_logit": 1.0},
    {"learning_rate_shape": "cosine"},
    {"learning_rate_shape": "constant"},
    {"delay": 0, "ramp": 0},
    {"delay": 7},
    {"crop_padding": 0},
    {"batch_size": 48, "epochs": 10},
    {"batch_size": 120, "epochs": 4},
    {"epochs": 1},
    {"logit_decay_dz": 0.0, "logit_decay_bit": 0.0},
    {"logit_decay_dz": 0.001, "logit_decay_bit": 0.02},
    {"dz_learning_rate": 0.002, "bit_learning_rate": 0.03},
    {"exclude_layers": ("conv1",)},
    {"exclude_layers": ("conv1", "layer1", "linear")},
    {"limit": 100, "batch_size": 10},
)


def examine_case(case: Case) -> Outcome:
    """Build the pipeline of `case` and examine it."""
    from experiments.doctor.examine import examine

    if case.kind == "foreign":
        report = examine(FOREIGN[case.name].build())
    elif case.kind == "healthy":
        report = examine(healthy(small_config(**case.settings)))
    else:
        with edited(FAULTS[case.name]):
            stop = case.name not in {fault.name for fault in THEMES["measuring and saving"]}
            report = examine(broken(FAULTS[case.name], small_config()), stop_when_faulty=stop)
    fired = tuple((f.stage, f.name, tuple(cause.key for cause in f.causes[:2])) for f in report.failed)
    return Outcome(
        kind=case.kind,
        name=case.name,
        settings=case.settings,
        fired=fired,
        causes=tuple(cause.key for cause in report.diagnosis),
        checks=tuple((f.stage, f.name) for f in report.findings),
        judged=sum(f.status != "not judged" for f in report.findings),
        unusual=tuple(f.name for f in report.findings if f.status == "unusual"),
        said=tuple(f"{f.name}: expected {f.expected}; measured {f.measured}" for f in report.failed),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.power", description="Measure the doctor's power.")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: 2)")
    parser.add_argument("--seeds", type=int, default=10, help="healthy runs of every kind (default: 10)")
    parser.add_argument("--only", help="examine what holds this text in its name, and write nothing")
    parser.add_argument("--again", help="examine what holds this text in its name, and put it into the last results")
    options = parser.parse_args(arguments)
    data = ["digits", "cifar10"] if CIFAR10.is_dir() else ["digits"]
    cases = [*fault_cases(), *healthy_cases(options.seeds, data), *(Case("foreign", name, {}) for name in FOREIGN)]
    part = options.only or options.again
    if part:
        cases = [case for case in cases if part in f"{case.kind}: {case.name}"]
    outcomes = _examine_all(cases, options.workers)
    if options.again:
        anew = {(outcome.kind, outcome.name): outcome for outcome in outcomes}
        outcomes = [anew.get((kept.kind, kept.name), kept) for kept in _last_results()]
    bad = [outcome for outcome in outcomes if not outcome.good]
    if not options.only:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
        PAGE.write_text(page(outcomes, data))
    faults = sum(outcome.kind == "fault" for outcome in outcomes)
    missed = sum(outcome.kind == "fault" for outcome in bad)
    print(f"{faults - missed} of {faults} faults caught and named; {len(bad) - missed} false alarms in", end=" ")
    print(f"{len(outcomes) - faults} healthy runs and pipelines")
    return 1 if bad else 0


def _last_results() -> list[Outcome]:
    """What the last whole run found; JSON has lists where an Outcome has tuples."""
    found = []
    for kept in json.loads(RESULTS.read_text()):
        fired = tuple((stage, name, tuple(causes)) for stage, name, causes in kept["fired"])
        lists = {name: tuple(kept[name]) for name in ("causes", "unusual", "said")}
        found.append(Outcome(**{**kept, **lists, "fired": fired, "checks": tuple(map(tuple, kept["checks"]))}))
    return found


def _examine_all(cases: Sequence[Case], workers: int) -> list[Outcome]:
    started, outcomes = time.monotonic(), []
    with multiprocessing.get_context("spawn").Pool(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for outcome in pool.imap(examine_case, cases):
            outcomes.append(outcome)
            print(f"[{len(outcomes)}/{len(cases)}, {time.monotonic() - started:.0f} s] {_line(outcome)}", flush=True)
    return outcomes


def _line(outcome: Outcome) -> str:
    if outcome.good:
        return f"good  {outcome.kind}: {outcome.name}"
    if outcome.kind != "fault":
        return "\n      ".join([f"FALSE ALARM  {outcome.kind}: {outcome.name}", *outcome.said])
    if not outcome.caught:
        return f"MISSED  {outcome.name}"
    wanted = " or ".join(FAULTS[outcome.name].causes)
    return f"MISNAMED  {outcome.name}: {', '.join(outcome.causes[:4])}; right: {wanted}\n      " + "\n      ".join(
        outcome.said
    )


def _name(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


if __name__ == "__main__":
    sys.exit(main())
