"""Causes in the parts of a pipeline, quantizers, optimizer, data, network: by key, a sentence and a remedy."""

from __future__ import annotations

TEXTS: dict[str, tuple[str, str]] = {
    # parts that do not run at all
    "step-raises": ("the step function raises an error.", "run the step alone on one batch and read the traceback"),
    "loader-raises": ("the loader raises an error.", "draw one batch by hand and read the traceback"),
    "loader-empty": (
        "the loader yields no batch.",
        "check the data set's length, drop_last, and that an iterator is not used up",
    ),
    "loader-used-up": (
        "the loader gives its batches once and then nothing: a generator is used up.",
        "hand over a list, a DataLoader, or a function that makes a new iterator for every epoch",
    ),
    "loader-shapes": (
        "the loader's batches do not have the shape (N, C, H, W) float with N whole-number labels.",
        "return a pair (images, labels) per batch: float images (N, C, H, W), int64 labels (N,)",
    ),
    "model-raises": ("the network raises an error in its forward pass.", "run the network alone on one batch"),
    "device-mismatch": (
        "the network's tensors and the images are on different devices, or on none.",
        "move the whole network to one device before the optimizer is built: model.to(device)",
    ),
    "dtype-mismatch": (
        "images and weights are of different floating-point types.",
        "give both the same type, or run the network under autocast",
    ),
    "weights-not-finite": (
        "weights are not finite numbers before the first step.",
        "look at the checkpoint they were loaded from, or at the initialisation",
    ),
    "measure-raises": ("measuring or evaluating raises an error.", "call it alone on the untrained network"),
    "saving-raises": ("writing the checkpoint raises an error.", "call it alone on the untrained network"),
    "no-quantizers": (
        "no quantizer was attached to the network.",
        "call attach_weight_quantizers before the optimizer is built",
    ),
    # attachment
    "quantizers-missing": (
        "quantizers were attached to only a part of the layers.",
        "look at exclude_layers: a pattern names a path from the root, so `conv1` is the stem alone",
    ),
    "quantizers-extra": (
        "layers were quantized that should stay in full precision.",
        "exclude the stem, the normalisation and the head: ('conv1', 'bn', 'linear')",
    ),
    "quantizers-off": ("quantizers are attached but switched off.", "toggle_quantization(model, True) before training"),
    "quantizers-off-in-training": (
        "the quantizers are switched off while the network trains.",
        "train under quantization(model, True); look for a toggle in the step or the loop that is not undone",
    ),
    "quantizers-off-in-evaluation": (
        "the quantizers are switched off while the network is evaluated.",
        "evaluate with the quantizers on: use quantization(model, enabled=...) as a context, so that it is undone",
    ),
    "toggle-broken": (
        "switching the quantizers off or on does not give back the network that was there.",
        "a parametrization must return the latent weight itself when off and keep no state when switched",
    ),
    # the quantizer's forward pass
    "bits-floored": (
        "the bit width is rounded down instead of to the nearest whole number.",
        "use round, not floor or int()",
    ),
    "bits-ceiled": ("the bit width is rounded up instead of to the nearest whole number.", "use round, not ceil"),
    "bits-not-rounded": (
        "the bit width is not rounded to a whole number.",
        "round it with a straight-through gradient",
    ),
    "bits-frozen": (
        "the bit width does not follow its logit.",
        "compute it from logit_bit at every call, and let logit_bit require a gradient",
    ),
    "bits-out-of-range": (
        "the bit width leaves its range from 2 to max_bits.",
        "b = round(|tanh theta_bit| (b_max - b_min) + b_min)",
    ),
    "bits-wrong": (
        "the bit width is not the one that the equation gives.",
        "b = round(|tanh theta_bit| (b_max - b_min) + b_min)",
    ),
    "range-wrong": (
        "the range R is not the 0.99-quantile of |w| (its maximum, for instance).",
        "R = quantile(|w|, 0.99), linear interpolation, over the whole layer",
    ),
    "dead-zone-wrong": (
        "the dead zone is not d = 2 R (1 - |tanh theta_dz|).",
        "compute d from the layer's range and logit",
    ),
    "dead-zone-frozen": ("the dead zone does not follow its logit.", "compute d from logit_dz at every call"),
    "grid-wrong": (
        "the quantizer's grid is not the one of CoDeQ (step, shift, or number of levels).",
        "s = (R - d/2) / (Q - 1/2), delta = d/2 - s/2, Q = 2^(b-1) - 1; value s q + delta sign(q)",
    ),
    "clip-missing": ("weights beyond the range are not clipped to the last level.", "q = clip(q, -Q, Q)"),
    "not-quantized": (
        "the weights that the network reads are the latent ones.",
        "let the parametrization return quantizer(w)",
    ),
    "quantizer-settings": (
        "the quantizers have other settings than configured (starting points, largest or fixed bits).",
        "hand config.quantizer_kwargs to attach_weight_quantizers",
    ),
    "quantizer-shared": (
        "layers share one quantizer, or one weight.",
        "build a quantizer for every layer: hand over the class, not an instance",
    ),
    "quantizer-precision": (
        "the quantized weights are rounded to half precision.",
        "quantize in float32 whatever the autocast mode: a step of 1/127 of the range is below bfloat16's resolution",
    ),
    "weights-stale": (
        "the quantized weights do not follow the latent ones: an old result is kept.",
        "compute them anew whenever the latent weight has changed",
    ),
    "joint-quantization": (
        "layers that are quantized together get other values or gradients than each gets alone.",
        "compare quantize_many with one call per layer: look for a shifted index, a detach, a stale result",
    ),
    # the quantizer's gradient
    "no-ste-round": (
        "the gradient does not pass straight through round, so latent weights do not learn.",
        "return the incoming gradient in round's backward (x + (round(x) - x).detach())",
    ),
    "no-ste-relu": (
        "the gradient does not pass straight through relu, so a weight in the dead zone can never leave it.",
        "give relu(|w| - delta) the identity as its backward",
    ),
    "no-ste-clip": (
        "the gradient does not pass straight through clip, so a saturated weight no longer moves.",
        "give clip(q, -Q, Q) the identity as its backward",
    ),
    "gradient-through-sign": ("a gradient passes through sign.", "use the plain sign, whose gradient is zero"),
    "gradient-through-quantile": (
        "a gradient passes through the range R (the quantile of |w|).",
        "compute R under no_grad or detach it",
    ),
    "gradient-through-clip-bound": ("a gradient passes through the bound of clip.", "detach Q where it limits q"),
    "weight-gradient-wrong": (
        "the quantizer's gradient for the weights is not the straight-through one.",
        "compare each piece's backward: round, relu and clip pass it on, sign and R do not",
    ),
    "logit-gradient-wrong": (
        "the quantizer's gradient for its logits is not the derivative of d, s and delta.",
        "look for a detach or no_grad between the logits and the grid, and at the rounding of the bits",
    ),
    "logits-detached": (
        "the logits get no gradient from the quantized weights.",
        "look for a detach, .item() or no_grad between the logits and the grid",
    ),
    # optimizer
    "logits-not-in-optimizer": (
        "the quantizers' logits are not in the optimizer, so dead zones and bit widths never move.",
        "give the optimizer the groups of parameter_groups(model)",
    ),
    "optimizer-built-before-quantizers": (
        "the optimizer was built before the quantizers were attached.",
        "attach first, then build the optimizer",
    ),
    "parameter-not-in-optimizer": (
        "trainable parameters are missing from the optimizer.",
        "every parameter with requires_grad belongs to exactly one group",
    ),
    "parameter-twice": (
        "a parameter is in the optimizer more than once.",
        "every parameter belongs to exactly one group",
    ),
    "foreign-parameter": (
        "the optimizer holds parameters that are not the network's.",
        "build the optimizer from the network that is trained, after its last change",
    ),
    "parameter-frozen": (
        "parameters that should be trained do not require a gradient.",
        "look for requires_grad_(False) or learnable_bit / learnable_deadzone",
    ),
    "wrong-group": (
        "parameters are in a group that belongs to another kind of parameter.",
        "sort by the last part of the name: logit_dz, logit_bit, and all others as weights",
    ),
    "added-later": (
        "logits were added to the optimizer after it was built, with its default settings.",
        "attach first, then build the optimizer with a named group of their own for the logits",
    ),
    "wrong-learning-rate": (
        "a group has another learning rate than configured.",
        "compare the groups with the configuration",
    ),
    "learning-rate-zero": (
        "a learning rate is 0, so nothing moves.",
        "set the group's learning rate, and look at its schedule",
    ),
    "learning-rate-too-large": (
        "the learning rate is far too large: one step moves weights by more than their own size.",
        "divide the learning rate by 10 until the first steps lower the loss",
    ),
    "learning-rate-schedule": (
        "the learning rate does not follow its schedule.",
        "lr = base rate x lr_lambda(share of the run done), on the group `weights` alone",
    ),
    "wrong-decay": (
        "a group has another weight decay than configured.",
        "the decay acts in the loss or in the optimizer, not both",
    ),
    "decay-on-wrong-group": (
        "the decay meant for the logits acts on other parameters.",
        "give weights decay 0, and the decay to the groups logit_dz and logit_bit",
    ),
    "other-optimizer": (
        "the optimizer is of another kind than the configuration says.",
        "use AdamW, or name the optimizer that is meant in `Expected`",
    ),
    # data
    "labels-shuffled": (
        "the labels do not belong to the images: they are shuffled or shifted.",
        "draw images and labels with one index; show some images with their labels",
    ),
    "test-labels-wrong": (
        "the test labels follow another order or numbering than the training labels.",
        "use one list of class names for both parts; show some test images with their labels",
    ),
    "loader-labels-wrong": (
        "the loader gives images labels that are not theirs.",
        "index images and labels with the same permutation",
    ),
    "labels-unbalanced": (
        "the classes are very unequally frequent.",
        "count the labels; a limit must keep every class",
    ),
    "class-missing": ("a class has no image.", "count the labels per class in the training and the test part"),
    "loader-not-shuffled": ("the loader does not shuffle: a batch holds few classes.", "shuffle in every epoch"),
    "loader-repeats": (
        "the loader gives the same images more than once in an epoch, and others never.",
        "draw without replacement",
    ),
    "test-in-training": (
        "test images are among the training images, so the test accuracy says nothing.",
        "split before anything else; compare the two parts by a hash of each image",
    ),
    "train-is-test": ("the loader trains on test images.", "give the training loader the training part"),
    "images-repeated": (
        "a part of the data holds the same images more than once.",
        "count distinct images by a hash of their bytes; look at how the part was indexed",
    ),
    "images-blank": (
        "images are blank or nearly so, so there is nothing to learn from them.",
        "show some images; look for transparency, 16 bits with small values, a division by 255 too many",
    ),
    "channels-swapped": (
        "the colour channels are in another order than they should be (BGR for RGB).",
        "show an image; OpenCV reads BGR, PIL and torchvision RGB",
    ),
    "wrong-normalisation": (
        "images are normalised with another mean or deviation than their own.",
        "(image / 255 - mean) / std with the training images' own; CIFAR-10's std is 0.2470, 0.2435, 0.2616",
    ),
    "not-normalised": ("images are not normalised.", "(image / 255 - mean) / std per channel"),
    "train-test-normalised-differently": (
        "training and test images are normalised differently.",
        "use one function and one mean and std for both",
    ),
    "augmentation-wrong": (
        "augmented images are not crops or mirror images of training images.",
        "look at a batch; a crop shows part of the image padded with black",
    ),
    "flip-unwanted": (
        "images are mirrored although the configuration says no flips.",
        "a mirrored digit is no digit: flip=False",
    ),
    "augmentation-missing": (
        "images are not augmented although the configuration says so.",
        "hand crop_padding and flip to the loader",
    ),
    "loader-same-order": (
        "every epoch draws the same images, crops and flips in the same order.",
        "seed the loader with the epoch: epoch_seed(seed, epoch)",
    ),
    "loader-incomplete": (
        "an epoch leaves out a part of the training images.",
        "an epoch has floor(images / batch size) batches",
    ),
    "loader-not-finite": ("a batch holds values that are not finite.", "look at the images of that batch"),
    # the start
    "head-badly-scaled": (
        "the untrained network is already very sure of itself.",
        "scale the head's initial weights down; check the normalisation of its input",
    ),
    "classes-mismatch": (
        "the network has another number of outputs than there are classes.",
        "build it with num_classes of the data",
    ),
    "network-differs": (
        "the network computes something else than its full-precision baseline with the same weights.",
        "compare the two module by module: a shortcut, an activation, a stride, BatchNorm's momentum and eps, a hook",
    ),
    "layer-unused": ("layers are not used in the forward pass.", "look at forward(): is every module called?"),
    "initial-weights": (
        "weights start at 0 or at one value, so nothing tells channels apart.",
        "initialise with kaiming_normal_",
    ),
    "batchnorm-momentum": (
        "BatchNorm's momentum is not between 0 and 0.5, so its statistics stand still or are the last batch's.",
        "torch's momentum is the share of the new batch: 0.1 is usual, what Keras calls 0.9",
    ),
    "softmax-twice": (
        "the network returns probabilities, of which the cross entropy takes the softmax again.",
        "return plain scores",
    ),
}
