"""Causes in what is measured, reported and saved: by key, a sentence and a remedy."""

from __future__ import annotations

TEXTS: dict[str, tuple[str, str]] = {
    # measuring
    "sparsity-on-latent": (
        "sparsity is measured on the latent weights, which are never exactly zero.",
        "count zeros of layer.weight, the quantized weights",
    ),
    "sparsity-wrong": (
        "the reported sparsity is not the share of zeros of the quantized weights.",
        "count zeros of layer.weight",
    ),
    "dead-per-input": (
        "dead channels are counted per input channel (axis 1) instead of per filter (axis 0).",
        "a filter is dead when W[o] is entirely 0: flatten(1).all(1)",
    ),
    "dead-wrong": ("the reported dead channels are not the filters that are entirely zero.", "flatten(1), all zero"),
    "bits-misreported": (
        "the reported bits are not those the quantizers use.",
        "read quantizer.get_bitwidth() at the end of the epoch",
    ),
    "bops-wrong-bits": (
        "BOPs are counted with other bit widths than the quantizers'.",
        "BOPs = MACs x weight bits x 32, the layer's own bits",
    ),
    "bops-dense-density": (
        "BOPs are counted with dense multiply-adds although weights are zero.",
        "density x dense MACs x weight bits x 32",
    ),
    "bops-activation-bits": ("BOPs are counted with other activation bits than 32.", "BOPs = MACs x weight bits x 32"),
    "bops-wrong": ("the reported BOPs are not MACs x weight bits x 32.", "add up the layers by hand"),
    "ratio-wrong": (
        "a compression ratio is not the dense FP32 network's cost divided by the compressed network's.",
        "ratio = baseline / compressed, at least 1 for a smaller network",
    ),
    "baseline-wrong": (
        "the network is compared with another baseline than the dense FP32 network.",
        "count the baseline before quantizers are attached: every weight, 32 x 32 bits",
    ),
    "macs-wrong": (
        "the reported MACs are not those of the network.",
        "count them with torch.utils.flop_counter, divided by 2",
    ),
    "dead-counted-as-removed": (
        "removed channels are overcounted: a dead filter is not a zero channel before BatchNorm's shift.",
        "count the MACs of the network that exact removal leaves",
    ),
    "partial-test-set": (
        "only a part of the test set is evaluated.",
        "evaluate every test image once, the last batch included",
    ),
    "accuracy-on-training": (
        "the reported test accuracy is that of the training images.",
        "evaluate on images that the training has not seen",
    ),
    "evaluation-in-training-mode": (
        "the network is evaluated in training mode, with the batch's own statistics.",
        "evaluate in eval mode and restore the mode afterwards",
    ),
    "evaluation-changes-model": (
        "evaluating or measuring changes the network.",
        "evaluate under no_grad in eval mode, and change nothing",
    ),
    "evaluation-not-repeatable": (
        "evaluating twice gives two results.",
        "eval mode, no random numbers, no shuffled subset",
    ),
    "accuracy-wrong": (
        "the reported accuracy is not the share of right answers on the test set.",
        "count them by hand",
    ),
    "rate-misreported": (
        "the recorded learning rate is not the one that the epoch's last step had.",
        "read it from the optimizer when the epoch is over",
    ),
    "test-loss-wrong": (
        "the reported test loss is not the mean over all test images.",
        "add up the losses of the images and divide by their number; batches may differ in size",
    ),
    "history-shifted": (
        "the history is off by one epoch: a record holds the figures of another epoch.",
        "measure after the epoch's last step, and append that record",
    ),
    "history-stale": ("the record does not describe the network as it is now.", "measure after the epoch's last step"),
    "checkpoint-of-other-epoch": (
        "the checkpoint holds the network of another epoch than the history's last.",
        "save after the epoch is measured, from the network that was measured",
    ),
    "checkpoint-incomplete": (
        "the checkpoint does not give back the network: tensors are missing or differ.",
        "save model.state_dict() with parameters and buffers",
    ),
    "checkpoint-not-resumable": (
        "a run cannot go on from the checkpoint as if it had not stopped: optimizer, records or configuration differ.",
        "save optimizer.state_dict(), the whole history and the configuration with the network",
    ),
    "report-wrong": (
        "a reported figure differs from its second computation.",
        "recompute it by hand from the checkpoint",
    ),
}
