"""What can be wrong with a pipeline, by key: a sentence and a remedy each. Checks rank these by their evidence."""

from __future__ import annotations

from experiments.doctor.report import Cause

_TEXTS: dict[str, tuple[str, str]] = {
    # parts that do not run at all
    "step-returns-no-loss": (
        "the step returns no loss.",
        "return the loss, one number, or an object with `total`",
    ),
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
    "range-kept": (
        "the range R is kept from earlier calls: frozen at the first one, or averaged over them.",
        "compute R from the weights of this call",
    ),
    "dead-zone-wrong": (
        "the dead zone is not d = 2 R (1 - |tanh theta_dz|).",
        "compute d from the layer's range and logit",
    ),
    "dead-zone-squashed": (
        "the dead zone's logit goes through another function than |tanh| (tanh without the absolute value, a sigmoid).",
        "d = 2 R (1 - |tanh theta_dz|); the sign of a logit means nothing",
    ),
    "dead-zone-frozen": ("the dead zone does not follow its logit.", "compute d from logit_dz at every call"),
    "grid-wrong": (
        "the quantizer's grid is not the one of CoDeQ (step, shift, or number of levels).",
        "s = (R - d/2) / (Q - 1/2), delta = d/2 - s/2, Q = 2^(b-1) - 1; value s q + delta sign(q)",
    ),
    "weights-changed-first": (
        "the weights are changed before they are quantized: rounded to half precision or decimals, centred, squashed.",
        "hand the latent weight itself to the quantizer",
    ),
    "quantized-twice": (
        "the weights are quantized twice: the second grid is laid over values of the first.",
        "quantize the latent weight once; look for a quantizer in the forward pass beside the parametrization",
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
    "learning-rate-too-small": (
        "the learning rate is far too small: nothing is learned in the steps that are made.",
        "multiply the learning rate by 10 until one batch is learned within some ten steps",
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
    "test-near-training": (
        "many test images are nearly the same as training images (compressed again, brighter, noisy).",
        "split by what the images come from (the photograph, the video, the writer), before any copy is made",
    ),
    "images-wrong": (
        "the training images are not those that the data set came with (layout, shift, resampling).",
        "show some images; compare their bytes with the source",
    ),
    "test-images-wrong": (
        "the test images are not those that the data set came with (layout, shift, resampling).",
        "show some test images; compare their bytes with the source and with what the test loader gives",
    ),
    "test-images-augmented": (
        "the test loader crops or mirrors images.",
        "give the test loader the images as they are, normalised alone",
    ),
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
    "augmentation-partial": (
        "only some images are augmented.",
        "draw a crop and a flip for every image of every batch",
    ),
    "augmentation-stops": (
        "later epochs are not augmented as the first one is.",
        "look at what the loader does by the number of the epoch",
    ),
    "augmentation-range": (
        "crops or flips are not uniform draws: some places never occur, or too often.",
        "offsets from 0 to 2 x crop_padding, both included, and a flip with probability 1/2",
    ),
    "augmentation-shared": (
        "the images of a batch share one crop or flip.",
        "draw offsets (B, 2) and flips (B,) for a batch, not one for all of it",
    ),
    "augmentation-repeated": (
        "the same crops or flips come again: for an image in every epoch, or for every batch.",
        "draw them from a generator that goes on from batch to batch and is seeded with the epoch",
    ),
    "augmentation-tied": (
        "the row of a crop and its column are not drawn independently.",
        "index the row with offsets[:, 0] and the column with offsets[:, 1]",
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
    "weights-too-large": (
        "weights start far too large: the network is unsure of nothing, or, behind BatchNorm, hardly turned by a step.",
        "initialise with kaiming_normal_: deviation sqrt(2 / fan)",
    ),
    "head-bias-wrong": (
        "the head's bias favours classes that are rare here, as if it were that of another data set.",
        "start it at 0, or at the logarithm of the classes' own shares",
    ),
    "batchnorm-momentum": (
        "BatchNorm's momentum is not between 0 and 0.5, so its statistics stand still or are the last batch's.",
        "torch's momentum is the share of the new batch: 0.1 is usual, what Keras calls 0.9",
    ),
    "softmax-twice": (
        "the network returns probabilities, of which the cross entropy takes the softmax again.",
        "return plain scores",
    ),
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
    "penalty-smoothed": (
        "a constant is added under the penalty's root, so small groups are hardly drawn to zero.",
        "take the root of the plain sum of squares, and give it the gradient 0 at 0",
    ),
    "penalty-stale": (
        "the penalty's value is an old one: it does not follow the weights.",
        "compute the penalty anew in every step",
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
    "weights-averaged": (
        "an average of the weights is written back after the update, so each step moves them by a part of it.",
        "keep the average (EMA, Lookahead) in a copy of the network, and evaluate that",
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
    "live-channel-removed": (
        "exact removal takes out channels on which the output depends.",
        "a channel goes only where it is constant or nothing reads it: look at padding, and at both branches of an add",
    ),
    "constants-dropped": (
        "the network that removal leaves lacks what constant channels contribute.",
        "a dead filter gives BatchNorm's shift and no zero: keep it in a bias, in a channel of ones, or behind an add",
    ),
    "channels-not-removed": (
        "channels that are constant, or that nothing reads, are kept and counted.",
        "go backwards from the output as well: what no live channel reads can go",
    ),
    "test-loader-wrong": (
        "the test loader gives other images or labels than the test set's.",
        "read it beside the raw images: no crops, no other resampling, every label with its image",
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

OF_QUANTIZERS = frozenset(
    key
    for key in _TEXTS
    if key.startswith(("quantize", "bits-", "range-", "dead-zone", "logit", "no-ste", "gradient-through"))
) | {
    "no-quantizers",
    "not-quantized",
    "optimizer-built-before-quantizers",
    "toggle-broken",
    "grid-wrong",
    "clip-missing",
    "weights-changed-first",
    "weights-stale",
    "joint-quantization",
    "penalty-on-latent",
    "sparsity-on-latent",
    "weight-gradient-wrong",
    "bops-wrong-bits",
}
"""What cannot be wrong with a pipeline that has no quantizers and is expected to have none."""

CAUSES = {key: Cause(key, *texts) for key, texts in _TEXTS.items()}


def causes(*keys: str | None) -> tuple[Cause, ...]:
    """The causes with these keys, in this order, each once; None is left out."""
    return tuple(CAUSES[key] for key in dict.fromkeys(key for key in keys if key))
