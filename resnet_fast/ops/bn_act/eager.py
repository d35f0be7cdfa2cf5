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
    dtype = checks.statistics_dtype(x)
    batch_mean, batch_var = [x.new_zeros(x.shape[1] if training else 0, dtype=dtype) for _ in range(2)]
    weight, bias, mean, var = [_wide(t, x) for t in (weight, bias, mean, var)]
    if x.numel() == 0:
        y = x.clone()  # torch's kernels refuse an empty batch, or divide by its size
    elif training:
        # With momentum 1 the running statistics become the batch's: the variance itself, not 1 / sqrt(var + eps).
        y = aten.native_batch_norm(x, weight, bias, batch_mean, batch_var, True, 1.0, eps)[0]
        n = x.numel() // x.shape[1]
        batch_var.mul_((n - 1) / n)
    else:
        y = aten.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
    if residual is not None:
        y = y + residual
    return common.as_output(torch.relu(y) if relu else y), batch_mean, batch_var


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel (of an empty batch: zeros)."""
    _, mean, var = fwd(x, None, None, None, None, None, True, 1.0, False)
    # One value (the others are in other processes): torch's variance is unbiased, 0 / 0 there.
    return mean, var.zero_() if x.numel() == x.shape[1] else var


def dx(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    count: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    """The input's gradient where dweight and dbias are the sums over `count` values of several processes' batches."""
    if x.numel() == 0:
        return common.as_output(torch.zeros_like(x))
    if relu:
        if y is None:
            wide = [_wide(t, x) for t in (weight, bias, mean, var)]
            y = aten.native_batch_norm(x.detach(), *wide, False, 0.0, eps)[0]
        dy = aten.threshold_backward(dy, y.detach(), 0)
    dtype = checks.statistics_dtype(x)
    rstd = (var.double() + eps).rsqrt().to(dtype)
    scale = rstd if weight is None else weight.to(dtype) * rstd
    mean, slope, offset, scale = (
        v.to(dtype)[:, None, None] for v in (mean, dweight * rstd / count, dbias / count, scale)
    )
    inner = dy.to(dtype) - offset - (x.to(dtype) - mean) * slope
    return common.as_output((inner * scale).to(x.dtype))


def _wide(vector: Tensor | None, x: Tensor) -> Tensor | None:
    """A vector in the statistics' dtype beside half-precision activations: torch takes them mixed, but all alike."""
    return vector if vector is None or x.element_size() >= 4 else vector.to(checks.statistics_dtype(x))


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
    none = x.new_empty(0)
    dtype = checks.statistics_dtype(x)
    if x.numel() == 0:
        zeros = x.new_zeros(x.shape[1], dtype=dtype)
        return (
            common.as_output(torch.zeros_like(x)) if wants[0] else none,
            zeros if wants[1] else none.clone(),
            zeros.clone() if wants[2] else none.clone(),
            common.as_output(dy.clone()) if wants[3] else none.clone(),
        )
    weight, bias, mean, var = [_wide(t, x) for t in (weight, bias, mean, var)]
    rstd = (var.double() + eps).rsqrt().to(var.dtype)  # one rounding, as torch's own
    if relu:
        if y is None:
            y = aten.native_batch_norm(x.detach(), weight, bias, mean, var, False, 0.0, eps)[0]
        dy = aten.threshold_backward(dy, y.detach(), 0)
    dx, dweight, dbias = none, none, none
    if any(wants[:3]):
        # The same strides for both: torch rounds dweight and dbias to bfloat16 where x and dy differ in layout.
        grad, x = common.as_output(dy.to(x.dtype)), common.as_output(x)
        mask = [wants[0], wants[1], wants[2]]
        given = (grad, x, weight, mean, var, mean, rstd, training, eps, mask)
        dx, dweight, dbias = aten.native_batch_norm_backward(*given)
    return (
        common.as_output(dx) if wants[0] else none,
        dweight.to(dtype) if wants[1] else none.clone(),
        dbias.to(dtype) if wants[2] else none.clone(),
        common.as_output(dy) if wants[3] else none.clone(),
    )
