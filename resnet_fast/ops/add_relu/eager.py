"""add_relu in plain torch: the specification, for every dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common


def why_not(door: str, *args: object) -> str | None:
    """Eager always can."""
    return None


def fwd(x: Tensor, residual: Tensor) -> Tensor:
    """y = relu(x + residual)."""
    return common.as_output(torch.relu_(x + residual))


def bwd(dy: Tensor, y: Tensor) -> Tensor:
    """The gradient of x and of residual."""
    return common.as_output(torch.ops.aten.threshold_backward(dy, y, 0))
