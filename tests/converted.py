"""What the tests of convert share: chains, and how to read a report."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnet_fast

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

#: chains a converted model must run fused: convolutions with their norms, and the stem's pooling
CHAINS = {"resnet18": 21, "resnet34": 37, "resnet50": 54, "resnet101": 105, "resnet152": 156}


def fused(model: nn.Module) -> nn.Module:
    model = resnet_fast.convert(model)
    assert resnet_fast.explain(model).fused > 0
    return model


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def note(model: nn.Module, name: str) -> str:
    return next(row.note for row in resnet_fast.explain(model).rows if row.name == name)
