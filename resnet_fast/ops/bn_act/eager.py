"""bn_act in plain torch: the specification, for every dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import checks, common

aten = torch.ops.aten


def why_not(door: str, *args: object) -> str | None:
    """Eager always can."""
    return None


def fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and in training the batch's mean and biased variance (two empty vectors otherwise)."""
    y, batch_mean, rstd = aten.native_batch_norm(x, weight, bias, mean, var, training, 0.0, eps)
    if residual is not None:
        y = y + residual
    if relu:
        y = torch.relu(y)
    dtype = checks.statistics_dtype(x)
    if not training:
        return common.as_output(y), x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
    if x.numel() == 0:
        nothing = x.new_zeros(x.shape[1], dtype=dtype)
        return common.as_output(y), nothing, nothing.clone()
    return common.as_output(y), batch_mean.to(dtype), rstd.to(dtype).pow(-2) - eps


def bwd(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    relu: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual as far as wanted (empty where not); differentiable again."""
    rstd = (var + eps).rsqrt()
    if relu:
        if y is None:
            y = aten.native_batch_norm(x.detach(), weight, bias, mean, var, False, 0.0, eps)[0]
        dy = aten.threshold_backward(dy, y.detach(), 0)
    none = x.new_empty(0)
    dx, dweight, dbias = none, none, none
    if any(wants[:3]):
        grad = dy.to(x.dtype)
        mask = [wants[0], wants[1], wants[2]]
        given = (grad, x, weight, mean, var, mean, rstd, training, eps, mask)
        dx, dweight, dbias = aten.native_batch_norm_backward(*given)
    dtype = checks.statistics_dtype(x)
    return (
        common.as_output(dx) if wants[0] else none,
        dweight.to(dtype) if wants[1] else none.clone(),
        dbias.to(dtype) if wants[2] else none.clone(),
        common.as_output(dy) if wants[3] else none.clone(),
    )
