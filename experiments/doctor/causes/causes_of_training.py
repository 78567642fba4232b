"""Causes in what is minimised, a step, and the run: by key, a sentence and a remedy."""

from __future__ import annotations

TEXTS: dict[str, tuple[str, str]] = {
    # objective
    "loss-wrong": (
        "the task loss is not the mean cross entropy of the batch.",
        "F.cross_entropy(scores.float(), labels)",
    ),
    "logit-squares-missing": (
        "the squared logits are not in the loss, so nothing draws bits down and dead zones open.",
        "add lambda_dz sum theta_dz^2 + lambda_bit sum theta_bit^2",
    ),
    "lambda-wrong": (
        "the squared logits have another weight than configured.",
        "compare lambda_dz and lambda_bit with the configuration",
    ),
    "penalty-not-in-loss": (
        "the sparsity penalty is not in the loss, or carries no gradient there.",
        "add coefficient x penalty(model) to the loss before backward",
    ),
    "penalty-detached": (
        "the sparsity penalty is computed on detached weights: it has a value but no gradient.",
        "compute it on layer.weight without detach, .data, .item() or no_grad",
    ),
    "penalty-on-latent": (
        "the sparsity penalty reads the latent weights instead of the quantized ones.",
        "use layer.weight, not layer.parametrizations.weight.original",
    ),
    "penalty-wrong-axis": (
        "the penalty's groups run along the wrong axis of the weights.",
        "a channel's filter is W[o] of the layer that makes it, its slices W[:, i] of the layers that read it",
    ),
    "penalty-groups-shifted": (
        "the penalty's groups are shifted against the channels they should hold.",
        "take the groups from src/pruning; option A's shortcut shifts channels by planes / 4 and nothing else does",
    ),
    "penalty-ignores-shortcut": (
        "the penalty's groups ignore the shortcut: channels that are added are not tied together.",
        "channels that an addition joins are removed together: one group for all layers that make or read them",
    ),
    "penalty-without-batchnorm": (
        "BatchNorm's scale and shift are not in the penalty's groups, so no channel ever dies.",
        "put scale and shift into the group of their channel",
    ),
    "penalty-without-slices": (
        "the slices that read a channel are not in its group.",
        "a group is filter, scale, shift and the slices of every layer that reads the channel",
    ),
    "penalty-wrong": (
        "the penalty is not the coupled group lasso of the network's channels.",
        "sum over channels of the group's 2-norm",
    ),
    "penalty-scaled": (
        "the sparsity penalty is counted with a wrong factor (twice, for instance).",
        "add coefficient x penalty(model) to the loss once",
    ),
    "penalty-sign": (
        "the sparsity penalty has the wrong sign, so groups grow.",
        "add it to the loss, do not subtract it",
    ),
    "penalty-not-lasso": (
        "the penalty is not a group lasso: single weights, or squares without a root.",
        "sum over groups of the 2-norm; only the root draws whole groups to zero",
    ),
    "penalty-not-differentiable": ("the penalty's gradient is not finite.", "guard the square root at 0"),
    "penalty-dominates": (
        "the coefficient's peak is far too large: the penalty outweighs the task.",
        "lower the peak: 0.008 on CIFAR-10 and 0.01 on the digits were measured",
    ),
    "coefficient-constant": (
        "the penalty's coefficient is constant instead of ramping.",
        "pass schedule(epoch, epochs) of this epoch",
    ),
    "coefficient-never-ramps": (
        "the penalty's coefficient never rises.",
        "check delay and ramp, and that the epoch is passed on",
    ),
    "coefficient-too-large": (
        "the penalty's coefficient rises far above its peak (to 1.0, for instance), which destroys the network.",
        "give the schedule the configured peak",
    ),
    "coefficient-shifted": ("the coefficient is the one of another epoch.", "epochs count from 0 in schedules"),
    "coefficient-wrong": (
        "the penalty's coefficient is not the configured one.",
        "pass schedule(epoch, epochs) of this epoch",
    ),
    "coefficient-not-applied": (
        "the step does not apply the coefficient that it is given.",
        "total = task + logits + coefficient x penalty",
    ),
    # a step
    "batchnorm-in-eval": (
        "BatchNorm is in eval mode while the network trains: its statistics never move.",
        "model.train() at the start of every epoch, and after every evaluation",
    ),
    "gradients-accumulate": ("gradients of earlier steps are added up.", "optimizer.zero_grad() before every backward"),
    "gradients-scaled": (
        "gradients are scaled or clipped before the update.",
        "look for clip_grad_norm_, a loss scale or a division",
    ),
    "gradient-missing": ("parameters get no gradient.", "look for a detach or no_grad between them and the loss"),
    "gradient-not-finite": ("gradients are not finite.", "look for a division by zero or a square root at 0"),
    "step-labels-wrong": (
        "the step trains on other labels than it is given.",
        "look for an index or a permutation inside the step",
    ),
    "step-images-wrong": (
        "the step trains on other images than it is given.",
        "look for a change of the batch inside the step",
    ),
    "step-gradient-wrong": (
        "the step's gradient is not that of the expected objective.",
        "compute the loss by hand for one batch",
    ),
    "loss-misreported": (
        "the step reports another loss than it minimises.",
        "return the parts of the loss that backward saw",
    ),
    "no-update": ("the step does not change the parameters.", "call optimizer.step() after backward"),
    "update-wrong": (
        "parameters do not move as the optimizer's rule says.",
        "look for a second optimizer step or a change by hand",
    ),
    "ascent": ("the update raises the loss: its sign is wrong.", "look for maximize=True or a negative loss"),
    "changes-too-much": ("a step changes things that it should leave alone.", "look for assignments in the step"),
    # training
    "optimizer-reset": (
        "the optimizer forgets its moments, or is built again, in mid-run.",
        "build the optimizer once, before the first epoch, and restore its state where a run goes on",
    ),
    "weights-reset": (
        "the weights are put back or exchanged between two epochs.",
        "look for load_state_dict, an average that is swapped in, or a network that is built again in the loop",
    ),
    "loss-not-finite": ("the loss is not a finite number.", "lower the learning rate or the peak of the penalty"),
    "stuck-at-chance": (
        "the network does not learn.",
        "overfit one batch first; then look at labels and learning rate",
    ),
    "accuracy-collapsed": ("accuracy collapsed during the run.", "lower the peak of the penalty, or the learning rate"),
    "layer-died": ("a whole layer was pruned away.", "lower the peak of the penalty"),
    "logits-stuck": ("the logits do not move.", "look whether they are in the optimizer and get a gradient"),
    "logits-rate": (
        "the logits move at another rate than their optimizer allows.",
        "compare their learning rate and decay",
    ),
    "logits-direction": (
        "the logits move away from 0 although their squares are in the loss.",
        "check the sign of the squared logits",
    ),
    "too-short": ("the run was too short or too small to show it.", "train longer"),
}
