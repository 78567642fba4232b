"""Classification networks of torchvision and timm, small enough for one core, with random weights: none are downloaded.

Images are of 64x64 pixels, or of the least that a network takes.
"""

from __future__ import annotations

import functools
from typing import Any

import timm
import torchvision
from torch import nn

from tests.zoo.cases import CLASSES, Case


def _torchvision(name: str, size: int = 64, **settings: Any) -> Case:
    build = functools.partial(torchvision.models.get_model, name, weights=None, num_classes=CLASSES, **settings)
    return Case(build, (3, size, size))


def _timm(name: str, size: int = 64, **settings: Any) -> Case:
    def build() -> nn.Module:
        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)

    return Case(build, (3, size, size))


TORCHVISION = {
    "squeezenet1_0": _torchvision("squeezenet1_0"),
    "squeezenet1_1": _torchvision("squeezenet1_1"),
    "shufflenet_v2_x0_5": _torchvision("shufflenet_v2_x0_5"),
    "shufflenet_v2_x1_0": _torchvision("shufflenet_v2_x1_0"),
    "mobilenet_v2": _torchvision("mobilenet_v2"),
    "mobilenet_v3_small": _torchvision("mobilenet_v3_small"),
    "mobilenet_v3_large": _torchvision("mobilenet_v3_large"),
    "mnasnet0_5": _torchvision("mnasnet0_5"),
    "mnasnet1_0": _torchvision("mnasnet1_0"),
    "efficientnet_b0": _torchvision("efficientnet_b0"),
    "efficientnet_b1": _torchvision("efficientnet_b1"),
    "regnet_x_400mf": _torchvision("regnet_x_400mf"),
    "regnet_y_400mf": _torchvision("regnet_y_400mf"),
    "regnet_y_800mf": _torchvision("regnet_y_800mf"),
    "googlenet": _torchvision("googlenet", aux_logits=False, init_weights=False),
    "inception_v3": _torchvision("inception_v3", 75, aux_logits=False, init_weights=False),
    "densenet121": _torchvision("densenet121"),
    "resnet18": _torchvision("resnet18"),
    "resnet34": _torchvision("resnet34"),
    "resnet50": _torchvision("resnet50"),
    "resnext50_32x4d": _torchvision("resnext50_32x4d"),
    "convnext_tiny": _torchvision("convnext_tiny"),
    "swin_t": _torchvision("swin_t"),
    "vit_b_16": _torchvision("vit_b_16", image_size=64),
}

TIMM = {
    "lcnet_050": _timm("lcnet_050"),
    "tinynet_e": _timm("tinynet_e"),
    "mobilenetv3_small_050": _timm("mobilenetv3_small_050"),
    "ghostnet_050": _timm("ghostnet_050"),
    "efficientnet_lite0": _timm("efficientnet_lite0"),
    "rexnet_100": _timm("rexnet_100"),
    "regnetx_002": _timm("regnetx_002"),
    "regnety_002": _timm("regnety_002"),
    "convnext_atto": _timm("convnext_atto"),
    "edgenext_xx_small": _timm("edgenext_xx_small"),
    "vit_tiny_patch16_224": _timm("vit_tiny_patch16_224", img_size=64),
    "mixer_s32_224": _timm("mixer_s32_224", img_size=64),
    "ese_vovnet19b_slim": _timm("ese_vovnet19b_slim"),
    "seresnet18": _timm("seresnet18"),
    "skresnet18": _timm("skresnet18"),
    "resnest14d": _timm("resnest14d"),
    "res2net50_26w_4s": _timm("res2net50_26w_4s"),
    "nf_resnet26": _timm("nf_resnet26"),
}
