"""bn_act by the C++ kernels: statistics and apply in one call, backward in two passes."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import _native
from resnet_fast.ops import common


def why_not(door: str, first: Tensor, *args: object) -> str | None:
    """Dense CPU tensors of one dtype, float32 or bfloat16; the vectors float32 or of that dtype."""
    if door == "statistics":
        images, vectors = (first,), ()
    elif door == "fwd":
        images, vectors = (first, args[4]), args[:4]
    else:
        images, vectors = (first, *args[:2]), args[2:6]
    if first.numel() == 0:
        return "the cpu room leaves empty tensors to eager"
    for t in vectors:
        if t is not None and t.dtype not in (torch.float32, first.dtype):
            return f"the cpu room wants vectors of float32 or of x's {first.dtype}, got {t.dtype}"
    return common.cpu_why_not(*images)


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
    x = common.channels_last(x)
    residual = None if residual is None else common.channels_last(residual)
    y, channels = common.cpu_like(x), x.shape[1]
    found = [torch.empty(channels if training else 0) for _ in range(2)]
    given = found if training else [common.vector(mean), common.vector(var)]
    gamma, beta = common.vector(weight), common.vector(bias)
    _native.module().bn_act_forward(
        _native.DTYPES[x.dtype], y.data_ptr(), given[0].data_ptr(), given[1].data_ptr(), 0, x.data_ptr(),
        common.address(residual), common.address(gamma), common.address(beta), x.numel() // channels, channels,
        eps, training, relu, torch.get_num_threads(),
    )  # fmt: skip
    return y, *found


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel."""
    x, channels = common.channels_last(x), x.shape[1]
    mean, var = torch.empty(channels), torch.empty(channels)
    _native.module().bn_act_forward(
        _native.DTYPES[x.dtype], 0, mean.data_ptr(), var.data_ptr(), 0, x.data_ptr(), 0, 0, 0, x.numel() // channels,
        channels, 0.0, True, False, torch.get_num_threads(),
    )  # fmt: skip
    return mean, var


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
    """dx, dweight, dbias, dresidual as far as wanted (empty where not)."""
    dy, x = common.channels_last(dy), common.channels_last(x)
    y = None if y is None else common.channels_last(y)
    none, channels = x.new_empty(0), x.shape[1]
    dx = common.cpu_like(x) if wants[0] else none
    dweight, dbias = (torch.empty(channels) if want else none.clone() for want in wants[1:3])
    dresidual = common.cpu_like(dy) if wants[3] else none.clone()
    gamma, beta, mean, var = (common.vector(t) for t in (weight, bias, mean, var))
    rows = x.numel() // channels
    _native.module().bn_act_backward(
        _native.DTYPES[x.dtype],
        *(t.data_ptr() if want else 0 for t, want in zip((dx, dweight, dbias, dresidual), wants)),
        dy.data_ptr(), x.data_ptr(), common.address(y), common.address(gamma), common.address(beta),
        mean.data_ptr(), var.data_ptr(), eps, rows, channels, rows, training, relu, False, torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight, dbias, dresidual


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
    dy, x = common.channels_last(dy), common.channels_last(x)
    y = None if y is None else common.channels_last(y)
    dx, channels = common.cpu_like(x), x.shape[1]
    gamma, beta, mean, var, dweight, dbias = (common.vector(t) for t in (weight, bias, mean, var, dweight, dbias))
    _native.module().bn_act_backward(
        _native.DTYPES[x.dtype], dx.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), 0,
        dy.data_ptr(), x.data_ptr(), common.address(y), common.address(gamma), common.address(beta),
        mean.data_ptr(), var.data_ptr(), eps, x.numel() // channels, channels, int(count), True, relu, True,
        torch.get_num_threads(),
    )  # fmt: skip
    return dx
