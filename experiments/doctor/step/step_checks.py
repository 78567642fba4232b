"""The first steps: does one real step minimise the expected objective, move what it should, and nothing else?

Steps are taken from the same state on the same batch: A without the penalty, B again with the gradients that A left,
C with the penalty. What differs between them is what the part that differs contributes. Everything is put back.
Axis letters: N batch, G groups.
"""

from __future__ import annotations

from experiments.doctor.pipeline import Pipeline
from experiments.doctor.runner import RAISED, CheckRunner, NotApplicable, Outcome, PartFailed
from experiments.doctor.step.step_gradients import (
    every_gradient,
    fresh_gradients,
    penalty_gradient_fits,
    squared_logits,
    task_gradient_fits,
)
from experiments.doctor.step.step_loss import modes_of_network, step_loss, step_runs
from experiments.doctor.step.step_updates import (
    downhill,
    only_what_it_should,
    overfit_one_batch,
    size_of_step,
    update_by_rule,
)
from experiments.doctor.training.steps_taken import take_steps


def step_checks(runner: CheckRunner, pipeline: Pipeline) -> None:
    """Take the steps and add their findings."""
    try:
        steps = take_steps(pipeline)
    except (NotApplicable, PartFailed) as reason:
        text = f"no step could be taken: {reason}"
        likely = [reason.cause] if isinstance(reason, PartFailed) else ["loader-shapes"]
        runner.add("a step runs", "the step function works on a batch", Outcome("no error", text, False, likely))
        return
    except RAISED as error:
        text = f"no step could be watched: {type(error).__name__}: {error}"
        outcome = Outcome("no error", text, False, ["model-raises", "step-raises"])
        runner.add("a step runs", "the step function works on a batch", outcome)
        return
    runner.check("a step runs", "the step function works on a batch", step_runs, steps, pipeline, blame="step-raises")
    if steps.plain is None:
        return
    runner.check(
        "mode of the network", "BatchNorm and quantizers are on while training", modes_of_network, steps, pipeline
    )
    runner.check("loss of a step", "the step reports and minimises the expected parts", step_loss, steps, pipeline)
    runner.check(
        "gradients", "every learnable gets a finite gradient that is not zero", every_gradient, steps, pipeline
    )
    runner.check(
        "gradient of the task", "the step's gradient is that of the cross entropy", task_gradient_fits, steps, pipeline
    )
    runner.check("squared logits", "lambda theta^2 of every logit is in the loss", squared_logits, steps, pipeline)
    runner.check(
        "gradient of the penalty", "coefficient x penalty reaches every group", penalty_gradient_fits, steps, pipeline
    )
    runner.check("fresh gradients", "a step forgets the gradients of the step before", fresh_gradients, steps)
    runner.check("update", "parameters move as the optimizer's rule says", update_by_rule, steps, pipeline)
    runner.check(
        "size of a step", "no weight moves by more than a fraction of its layer's size", size_of_step, steps, pipeline
    )
    runner.check(
        "only what it should",
        "a step moves all learnables and BatchNorm's statistics, no more",
        only_what_it_should,
        steps,
        pipeline,
    )
    runner.check("direction of a step", "a small step along the update lowers the loss", downhill, steps, pipeline)
    runner.check("one batch", "a few steps on one batch lower its loss clearly", overfit_one_batch, pipeline)
