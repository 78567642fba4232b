"""The verdict on histories made by hand: a healthy one, and one for each expectation that is not met."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from experiments.pipeline import DEBUG, FAILED, NOT_JUDGED, PASSED, RunConfig, Verdict, judge, lagging_statistics
from experiments.pipeline.config import PAPER_4BIT, SMOKE
from experiments.pipeline.verdict import FEWEST_STEPS
from src.training import EpochRecord, History, LayerRecord

NAMES = [
    "layers quantized",
    "loss falls",
    "accuracy climbs",
    "accuracy reached",
    "zeros appear",
    "channels die",
    "bits fall",
    "accuracy recovers",
    "no layer dies whole",
]


def healthy(epochs: int = 20) -> list[EpochRecord]:
    """Loss 2.2 to 0.5, accuracy 30 to 82 %, zeros 0 to 52 %, dead filters 0 to 25 %, bits 8 to 7."""
    records = []
    for epoch in range(1, epochs + 1):
        done = (epoch - 1) / 19
        dead = (epoch > 12, False, False, False)
        layers = tuple(LayerRecord(name, 8 - done, 0.1, 0.52 * done, dead) for name in ("a", "b"))
        record = EpochRecord(
            epoch=epoch, loss=2.5 - 1.7 * done, task_loss=2.2 - 1.7 * done, logit_penalty=0.3, group_penalty=400.0,
            coefficient=DEBUG.schedule()(epoch - 1, 20), learning_rate=1e-3, train_accuracy=0.3 + 0.5 * done,
            test_loss=2.0 - done, accuracy=0.30 + 0.52 * done, unstructured_sparsity=0.52 * done,
            structured_sparsity=0.25 if epoch > 12 else 0.0, mean_bits=8 - done, seconds=30.0, layers=layers,
            recalibrated_accuracy=0.7,
        )  # fmt: skip
        records.append(record)
    return records


def verdict_of(
    records: list[EpochRecord], config: RunConfig = DEBUG, attached: tuple[str, ...] = ("a", "b")
) -> Verdict:
    return judge(History(config.epochs, records), config, 10, attached)


def statuses(verdict: Verdict) -> dict[str, str]:
    return {each.name: each.status for each in verdict.expectations}


def ending(**changes: Any) -> list[EpochRecord]:
    records = healthy()
    return [*records[:-1], replace(records[-1], **changes)]


def throughout(**changes: Any) -> list[EpochRecord]:
    return [replace(record, **changes) for record in healthy()]


def test_a_healthy_run() -> None:
    verdict = verdict_of(healthy())
    assert statuses(verdict) == dict.fromkeys(NAMES, PASSED)
    assert (verdict.healthy, verdict.faulty) == (True, False)
    assert verdict.headline == "HEALTHY: all 9 expectations met"
    assert verdict.to_json()["state"] == "healthy"
    assert [each.measured for each in verdict.expectations] == [
        *("2", "0.50 task loss", "82.0%", "82.0%", "0.0% -> 52.0%", "25.0% of the filters", "7.00 bits on average"),
        *("82.0%; lowest 46.4% (70.0% with BatchNorm recalibrated), after epoch 7", "all live"),
    ]
    dead = verdict_of(whole_layer_dead())
    assert dead.expectations[-1].measured == "b", "the dead layer is named"


def whole_layer_dead() -> list[EpochRecord]:
    records = healthy()
    layers = (records[-1].layers[0], replace(records[-1].layers[1], dead=(True,) * 4))
    return [*records[:-1], replace(records[-1], layers=layers)]


def collapsed() -> list[EpochRecord]:
    """Mid-run 97 %, then 48 %: above what a run must reach here, below half of mid-run."""
    return [replace(r, accuracy=0.97 if r.epoch < 20 else 0.48) for r in healthy()]


ALONE: dict[str, tuple[list[EpochRecord], RunConfig, tuple[str, ...]]] = {
    "layers quantized": (healthy(), DEBUG, ("a", "b", "c")),
    "loss falls": (ending(task_loss=2.2), DEBUG, ("a", "b")),
    "accuracy climbs": (throughout(accuracy=0.19), replace(DEBUG, expected_accuracy=0.1), ("a", "b")),
    "accuracy reached": (throughout(accuracy=0.599), DEBUG, ("a", "b")),
    "zeros appear": (throughout(unstructured_sparsity=0.009), DEBUG, ("a", "b")),
    "channels die": (throughout(structured_sparsity=0.0), DEBUG, ("a", "b")),
    "bits fall": (throughout(mean_bits=8.0), DEBUG, ("a", "b")),
    "accuracy recovers": (collapsed(), replace(DEBUG, expected_accuracy=0.4), ("a", "b")),
    "no layer dies whole": (whole_layer_dead(), DEBUG, ("a", "b")),
}


@pytest.mark.parametrize("name", NAMES)
def test_one_expectation_that_is_not_met_is_the_only_failure(name: str) -> None:
    records, config, attached = ALONE[name]
    verdict = verdict_of(records, config, attached)
    assert statuses(verdict) == {**dict.fromkeys(NAMES, PASSED), name: FAILED}
    assert (verdict.healthy, verdict.faulty) == (False, True)
    assert verdict.headline == f"FAULT: 1 of 9 expectations not met ({name})"
    assert verdict.to_json()["state"] == "faulty"
    (failed,) = [each for each in verdict.expectations if each.status == FAILED]
    lines = verdict.text().splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith(f"  FAILED      {name} "))
    assert failed.measured in lines[at]
    assert failed.expected in lines[at]
    assert lines[at + 1].strip() == f"look at: {failed.look_at}"
    assert len(lines) == 1 + 9 + 1  # the headline, the expectations, and where to look for the one


@pytest.mark.parametrize("zeros", [(0.0, 0.009), (0.3, 0.3), (0.3, 0.2)])
def test_zeros_must_grow_and_be_more_than_a_rounding(zeros: tuple[float, float]) -> None:
    first, *between = ending(unstructured_sparsity=zeros[1])
    verdict = verdict_of([replace(first, unstructured_sparsity=zeros[0]), *between])
    assert statuses(verdict)["zeros appear"] == FAILED


def test_one_epoch_is_not_judged_by_what_takes_longer() -> None:
    verdict = verdict_of(healthy(1), replace(DEBUG, epochs=1))
    met = {"layers quantized", "accuracy climbs", "no layer dies whole"}  # 30 % is above twice chance
    assert statuses(verdict) == {name: PASSED if name in met else NOT_JUDGED for name in NAMES}
    assert (verdict.healthy, verdict.faulty) == (False, False)
    assert verdict.headline.startswith(
        "INCONCLUSIVE: 3 of 9 expectations met, not judged: loss falls, accuracy reached,"
    )
    assert verdict.to_json()["state"] == "inconclusive"


def test_a_run_before_the_penalty_is_not_asked_for_zeros_or_dead_channels() -> None:
    found = statuses(verdict_of(healthy(5), replace(DEBUG, epochs=5)))
    unmet = {"accuracy reached", "channels die"}  # some zeros are there by then, and some bits are gone
    assert {name for name, status in found.items() if status == NOT_JUDGED} == unmet
    assert {status for name, status in found.items() if name not in unmet} == {PASSED}


def missing(records: list[EpochRecord], **how: Any) -> dict[str, str]:
    """What each expectation that is not judged says it lacks."""
    verdict = judge(History(20, records), DEBUG, 10, ("a", "b"), **how)
    return {each.name: each.measured.split("; ")[-1] for each in verdict.expectations if each.status == NOT_JUDGED}


def test_what_is_not_judged_says_how_many_epochs_are_missing() -> None:
    """The preset has 20 epochs, the penalty is on from epoch 7, and dead filters have 7 epochs with it to appear."""
    nothing = throughout(accuracy=0.1, unstructured_sparsity=0.0, structured_sparsity=0.0, mean_bits=8.0)
    first = {
        "loss falls": "needs 1 more epoch to tell",
        "accuracy climbs": "needs 1 more epoch to tell",
        "accuracy reached": "needs 19 more epochs to tell",
        "zeros appear": "needs 6 more epochs to tell",
        "channels die": "needs 12 more epochs to tell",
        "bits fall": "needs 19 more epochs to tell",
        "accuracy recovers": "needs 3 more epochs to tell",
    }
    assert missing(nothing[:1]) == first
    later = {"accuracy reached": "needs 8 more epochs to tell", "bits fall": "needs 8 more epochs to tell"}
    assert missing(nothing[:12]) == {**later, "channels die": "needs 1 more epoch to tell"}
    assert missing(nothing[:13]) == dict.fromkeys(later, "needs 7 more epochs to tell")
    # 500 updates at 20 an epoch are 25 epochs
    assert set(missing(nothing, steps=400).values()) == {"needs 5 more epochs to tell"}


def test_a_short_run_cannot_show_that_it_keeps_its_accuracy() -> None:
    """Two epochs cost nothing against a baseline that has learned as little."""
    found = judge(History(20, healthy(2)), DEBUG, 10, ("a", "b"), accuracies=(0.3, 0.3)).expectations[-1]
    assert (found.name, found.status) == ("accuracy kept", NOT_JUDGED)


def test_a_part_of_the_images_is_not_judged_by_what_needs_all() -> None:
    nothing = throughout(accuracy=0.1, unstructured_sparsity=0.0, structured_sparsity=0.0, mean_bits=8.0)
    verdict = verdict_of(nothing, replace(DEBUG, limit=100))
    assert not verdict.faulty
    judged = {name for name, status in statuses(verdict).items() if status == PASSED}
    assert judged == {"layers quantized", "loss falls", "no layer dies whole"}


def test_what_a_configuration_switches_off_is_not_expected() -> None:
    fixed = statuses(verdict_of(throughout(mean_bits=4.0), replace(DEBUG, learnable_bit=False)))
    assert set(fixed) == set(NAMES) - {"bits fall"}
    assert set(fixed.values()) == {PASSED}
    dense = statuses(verdict_of(healthy(), replace(DEBUG, peak=0.0, learnable_deadzone=False)))
    assert set(dense) == set(NAMES) - {"channels die", "zeros appear"}
    assert {"bits fall", "channels die"}.isdisjoint(statuses(verdict_of(healthy(), PAPER_4BIT)))


def test_a_budget_of_bops_or_bytes_decides_what_shrinks() -> None:
    """20 % of the BOPs: 8 bits are a quarter of 32, and zeros alone do the rest."""
    shrunk = {"zeros appear", "channels die", "bits fall"}
    assert set(statuses(verdict_of(healthy(), replace(DEBUG, target="bops 20%")))) == set(NAMES) - shrunk
    assert set(statuses(verdict_of(healthy(), replace(DEBUG, target="bytes 5x")))) == set(NAMES) - shrunk
    assert set(statuses(verdict_of(healthy(), replace(DEBUG, target="macs 50%")))) == set(NAMES)


def test_a_configuration_of_ones_own_is_measured_by_itself() -> None:
    mine = replace(SMOKE, preset="mine", epochs=20, delay=5, expected_accuracy=0.8)
    assert verdict_of(healthy(), mine).healthy
    assert verdict_of(healthy(), replace(mine, expected_accuracy=0.83)).faulty


def test_few_steps_do_not_show_a_recovery_and_two_classes_can_pass() -> None:
    records = healthy()
    few = judge(History(DEBUG.epochs, records), DEBUG, 10, ("a", "b"), steps=FEWEST_STEPS - 1)
    found = statuses(few)
    assert found == {**dict.fromkeys(NAMES, PASSED), "accuracy recovers": NOT_JUDGED}
    assert (few.healthy, few.faulty) == (False, False)
    assert judge(History(DEBUG.epochs, records), DEBUG, 10, ("a", "b"), steps=FEWEST_STEPS).healthy
    perfect = [replace(record, accuracy=1.0) for record in records]
    # chance is 1/2, so twice chance would be 100 %: the bar is 1/2 + 1/8
    two = judge(History(DEBUG.epochs, perfect), DEBUG, 2, ("a", "b"))
    assert next(f for f in two.expectations if f.name == "accuracy climbs").expected.startswith("above 62.5%")
    assert two.healthy


@pytest.mark.parametrize(
    ("lags", "said"),
    [((1, 2, 4, 6, 7, 8), "6 of 8 epochs (1–2, 4, 6–8)"), ((), "0 of 8 epochs"), ((8,), "1 of 8 epochs (8)")],
)
def test_the_epochs_after_which_batchnorm_lags(lags: tuple[int, ...], said: str) -> None:
    records = [
        replace(one, accuracy=0.5, recalibrated_accuracy=0.7 if one.epoch in lags else 0.55) for one in healthy(8)
    ]
    assert lagging_statistics(History(8, records)) == said
