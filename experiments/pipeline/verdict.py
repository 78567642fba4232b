"""The verdict on a finished run: what a healthy one shows, what this one shows, and where to look if it does not.

Each expectation is judged by itself. One that a run could not meet, because it was too short or saw too few images, is
"not judged" instead of failed; the run is healthy when nothing failed and everything was judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from experiments.pipeline.config import PRESETS, RunConfig
from src.training import History

PASSED, FAILED, NOT_JUDGED = "passed", "FAILED", "not judged"


@dataclass(frozen=True)
class Finding:
    """One expectation: what it proves, what was expected, what was measured, and what to look at where it failed."""

    name: str
    expected: str
    measured: str
    status: str
    look_at: str


@dataclass(frozen=True)
class Verdict:
    """All findings of a run. healthy: nothing failed and everything was judged. faulty: something failed."""

    findings: tuple[Finding, ...]

    @property
    def faulty(self) -> bool:
        return any(finding.status == FAILED for finding in self.findings)

    @property
    def healthy(self) -> bool:
        return all(finding.status == PASSED for finding in self.findings)

    @property
    def headline(self) -> str:
        failed = [finding.name for finding in self.findings if finding.status == FAILED]
        if failed:
            return f"FAULT: {len(failed)} of {len(self.findings)} expectations not met ({', '.join(failed)})"
        judged = sum(finding.status == PASSED for finding in self.findings)
        if self.healthy:
            return f"HEALTHY: all {judged} expectations met"
        return (
            f"INCONCLUSIVE: {judged} of {len(self.findings)} expectations met, the rest could not be judged in this run"
        )

    def to_json(self) -> dict[str, Any]:
        state = "healthy" if self.healthy else "faulty" if self.faulty else "inconclusive"
        return {"state": state, "headline": self.headline, "findings": [asdict(finding) for finding in self.findings]}

    def text(self) -> str:
        """The findings as a table for a terminal, failures with what to look at below them."""
        names = max(len(finding.name) for finding in self.findings)
        expected = max(len(finding.expected) for finding in self.findings)
        lines = [self.headline]
        for finding in self.findings:
            lines.append(
                f"  {finding.status:<10}  {finding.name:<{names}}  expected {finding.expected:<{expected}}  "
                f"measured {finding.measured}"
            )
            if finding.status == FAILED:
                lines.append(f"  {'':<10}  {'':<{names}}  look at: {finding.look_at}")
        return "\n".join(lines)


FEWEST_STEPS = 500  # below this the logits, which move by a learning rate a step, have hardly moved


def judge(
    history: History, config: RunConfig, num_classes: int, expected_layers: Sequence[str], steps: int | None = None
) -> Verdict:
    """Judge a finished run by what its epochs recorded. Raises ValueError for an empty history.

    expected_layers: names of the layers that should be quantized. steps: updates made in all; below 500 most of what is
    expected is not judged. None where it is not known.
    """
    last, first = history.last, history[0]
    chance = 1 / num_classes
    floor = min(2 * chance, chance + (1 - chance) / 4)  # twice chance says nothing where there are two classes
    preset = PRESETS.get(config.preset, config)  # a configuration of one's own is measured by itself
    enough = steps is None or steps >= FEWEST_STEPS
    whole = config.limit is None and enough  # too few steps show little of what is expected
    full = whole and len(history) >= preset.epochs
    penalised = sum(record.coefficient > 0 for record in history)
    settled = penalised >= (preset.epochs - preset.delay) // 2  # epochs that dead filters take to appear
    best = max(floor, *(record.accuracy for record in history))
    learned_bits, learned_zone = config.learnable_bit, config.learnable_deadzone

    def finding(name: str, expected: str, measured: str, ok: bool, judged: bool, look_at: str) -> Finding:
        if not judged:
            return Finding(name, expected, f"{measured}, in a run too short or too small to tell", NOT_JUDGED, look_at)
        return Finding(name, expected, measured, PASSED if ok else FAILED, look_at)

    def percent(share: float) -> str:
        return f"{100 * share:.1f}%"

    quantized = [layer.name for layer in last.layers]
    odd = sorted(set(expected_layers) ^ set(quantized))
    findings = [
        finding(
            "layers quantized",
            f"{len(expected_layers)}, every one by name",
            f"{len(quantized)}" + (f"; not as expected: {', '.join(odd[:3])}" if odd else ""),
            not odd,
            True,
            "exclude_layers: a pattern may take out more than was meant",
        ),
        finding(
            "loss falls",
            f"below {first.task_loss:.2f} (epoch 1)",
            f"{last.task_loss:.2f} task loss",
            last.task_loss < first.task_loss,
            len(history) > 1,
            "learning rate, normalisation of the images, labels",
        ),
        finding(
            "accuracy climbs",
            f"above {percent(floor)}; chance is {percent(chance)}",
            percent(last.accuracy),
            last.accuracy > floor,
            whole and len(history) > 1,
            "the loss curve; a peak of the penalty that is too high; quantizers switched off in training only",
        ),
        finding(
            "accuracy reached",
            f"at least {percent(config.expected_accuracy)}",
            percent(last.accuracy),
            last.accuracy >= config.expected_accuracy,
            full,
            "the coefficient's peak (accuracy that falls as it ramps), then the learning-rate schedule",
        ),
        finding(
            "zeros appear",
            "more at the end than after epoch 1",
            f"{percent(first.unstructured_sparsity)} -> {percent(last.unstructured_sparsity)}",
            last.unstructured_sparsity > first.unstructured_sparsity and last.unstructured_sparsity > 0.01,
            learned_zone and (full or (whole and penalised > 0)),
            "dead-zone logits: are they in the optimizer, is their regularization in the loss?",
        ),
        finding(
            "channels die",
            "more than 0 dead filters",
            f"{percent(last.structured_sparsity)} of the filters",
            last.structured_sparsity > 0,
            config.peak > 0 and whole and settled,
            "the coefficient's schedule, and whether BatchNorm's scale is in the groups",
        ),
        finding(
            "bits fall",
            f"below {first.mean_bits:.1f} (epoch 1)" if len(history) > 1 else f"below {config.max_bits}",
            f"{last.mean_bits:.2f} bits on average",
            last.mean_bits < first.mean_bits or last.mean_bits < config.max_bits,
            learned_bits and full,
            "bit-width logits: are they in the optimizer, does the 0.01 act in the loss?",
        ),
        finding(
            "nothing collapses",
            f"above {percent(best / 2)}, half of the best epoch",
            percent(last.accuracy),
            last.accuracy > best / 2,
            whole and len(history) > 3,
            "the coefficient when accuracy fell; layers that died whole in the liveness map",
        ),
        finding(
            "no layer dies whole",
            "a live filter in every layer",
            ", ".join(layer.name for layer in last.layers if all(layer.dead)) or "all live",
            not any(all(layer.dead) for layer in last.layers),
            True,
            "the coefficient's peak: a whole branch was pruned away",
        ),
    ]
    applicable = {
        "zeros appear": learned_zone,
        "channels die": config.peak > 0,
        "bits fall": learned_bits,
    }
    return Verdict(tuple(f for f in findings if applicable.get(f.name, True)))
