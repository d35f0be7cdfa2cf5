"""scale_add_relu in plain torch: the specification, for every dtype and device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resnet_fast.ops import common


def why_not(door: str, *args: object) -> str | None:
    """Eager always can."""
    return None


def dtype(*tensors: Tensor) -> torch.dtype:
    """What these dtypes promote to."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors))


def fwd(x: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
    """y = relu(x * scale + residual)."""
    return common.as_output(torch.relu(x * scale + residual))


def bwd(dy: Tensor, x: Tensor, scale: Tensor, y: Tensor, wants: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dscale, dresidual as far as wanted (empty where not), of y's dtype; differentiable again."""
    return gradients(torch.ops.aten.threshold_backward(dy, y.detach(), 0), x, scale, wants)


def gradients(g: Tensor, x: Tensor, scale: Tensor, wants: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """The same from g, the gradient before the ReLU."""
    none = x.new_empty(0)
    return (
        common.as_output((g * scale).to(g.dtype)) if wants[0] else none,
        (g * x).sum((2, 3), keepdim=True).to(g.dtype) if wants[1] else none.clone(),
        common.as_output(g) if wants[2] else none.clone(),
    )
