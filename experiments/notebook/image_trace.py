"""One test image through a trained network three times: with float weights, quantized, and compacted.

float       the latent weights, quantizers off, with BatchNorm statistics of their own: those of the trained network
            belong to the quantized weights, and without the dead zone its answers would mean nothing
quantized   the trained network as it is used, zeros in place
compacted   the smaller network that exact removal leaves (src/pruning/compaction.py): removed channels have no map
Axis letters: K shown channels, H W space, C classes.
"""

from __future__ import annotations

import copy
import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from experiments.figures import COMPACTED, FLOAT, QUANTIZED, ImageTrace, Stage
from src.data import ImageData, normalize, test_batches
from src.pruning import CompactionError, CompactNetwork, analyze_liveness, compact
from utils_quantization import eval_mode, shared_quantized_weights, toggle_quantization

MEASURED, BATCH = 512, 128  # training images for the float network's BatchNorm statistics


class ThreeNetworks:
    """A trained network in its three forms, ready to look at any test image.

    stages: every layer followed by a BatchNorm, by name. missing: why there is no compacted network, or "".
    """

    def __init__(self, model: nn.Module, data: ImageData) -> None:
        self.model, self.data = model, data
        self.float = _float_network(model, data)
        self.missing = ""
        self.compacted: CompactNetwork | None = None
        with eval_mode(model):
            liveness = analyze_liveness(model)
            try:
                self.compacted = compact(model)
            except CompactionError as error:
                self.missing = str(error).split(":")[0]
        layer_of = {op.name: op.module for op in liveness.ops if op.kind in ("conv", "linear")}
        self.stages: dict[str, Stage] = {}
        for op in liveness.ops:
            layer = layer_of.get(op.inputs[0]) if op.kind == "batchnorm" else None
            if layer and op.module:
                kept = liveness.kept[op.name]
                self.stages[layer] = Stage(layer, op.module, len(kept), np.flatnonzero(kept))
        if not self.stages:
            raise ValueError("the network has no layer with a BatchNorm behind it: there is no feature map to show")

    @functools.cached_property
    @torch.no_grad()
    def misclassified(self) -> list[int]:
        """The test images that the quantized network gets wrong, ascending."""
        with eval_mode(self.model), shared_quantized_weights(self.model):
            wrong = [self.model(images).argmax(1) != labels for images, labels in test_batches(self.data, 500)]
        return torch.cat(wrong).nonzero()[:, 0].tolist()

    @torch.no_grad()
    def trace(self, number: int, layer: str) -> ImageTrace:
        """Test image `number` (from 0) through all three, seen behind `layer`, one of `stages`."""
        stage = self.stages[layer]
        channels = stage.shown()
        image = normalize(self.data.test_images[number : number + 1], self.data.mean, self.data.std)
        scores, maps = {}, {}
        for name, network in ((FLOAT, self.float), (QUANTIZED, self.model)):
            with eval_mode(network), shared_quantized_weights(network):
                scores[name], seen = _look(network, stage.norm, image)
            maps[name] = seen[channels]
        if self.compacted is not None:
            scores[COMPACTED], seen = _look(self.compacted, stage.norm, image)
            full = np.full_like(maps[QUANTIZED], np.nan)
            here = np.isin(channels, stage.kept)
            full[here] = seen[np.searchsorted(stage.kept, channels[here])]
            maps[COMPACTED] = full
        return ImageTrace(
            number=number,
            image=self.data.test_images[number].cpu().numpy(),
            label=int(self.data.test_labels[number]),
            class_names=self.data.class_names,
            stage=stage,
            channels=channels,
            scores=scores,
            maps=maps,
        )


@torch.no_grad()
def _float_network(model: nn.Module, data: ImageData) -> nn.Module:
    """A copy with the quantizers off and BatchNorm statistics measured on the first training images."""
    network = copy.deepcopy(model)
    toggle_quantization(network, False)
    images = data.train_images[:MEASURED].split(BATCH)
    update_bn((normalize(batch, data.mean, data.std) for batch in images), network)
    return network.eval()


def _look(network: nn.Module, module: str, image: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logits (C,) and the output of `module`, (channels, H, W); no channel where the network has no such module."""
    seen = [torch.empty(1, 0, 1, 1)]
    here = [one for name, one in network.named_modules() if name == module]
    hooks = [one.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) for one in here]
    scores = network(image)[0]
    for hook in hooks:
        hook.remove()
    return scores.double().cpu().numpy(), seen[-1][0].double().cpu().numpy()
