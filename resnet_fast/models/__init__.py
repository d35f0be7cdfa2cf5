"""Residual networks on the fused blocks: the ImageNet family, the CIFAR family and its plain twins.

`list_models()` names them, `create_model(name)` makes one; each name is also a function of this module.
"""

from resnet_fast.models.cifar import (
    CifarPlainNet,
    CifarResNet,
    plain20,
    plain32,
    plain44,
    plain56,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
    resnet1202,
)
from resnet_fast.models.registry import create_model, list_models
from resnet_fast.models.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

__all__ = [
    "CifarPlainNet",
    "CifarResNet",
    "ResNet",
    "create_model",
    "list_models",
    "plain20",
    "plain32",
    "plain44",
    "plain56",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnet1202",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
