"""bn_act_max_pool2d by the C++ kernels: the normalised map is neither written nor read."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import _native
from resnet_fast.ops import common


def why_not(door: str, first: Tensor, *args: object) -> str | None:
    """Dense CPU tensors of one dtype, float32 or bfloat16; the vectors float32 or of that dtype."""
    images, vectors = ((first,), args[:4]) if door == "fwd" else ((first, args[1]), args[2:6])
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
    mean: Tensor,
    var: Tensor,
    eps: float,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    size: list[int],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """max_pool2d(relu(bn(x))) and, if saved, each maximum's place in its window as uint8, 255 where it is not above 0."""
    x = common.channels_last(x)
    n, c, h, w = x.shape
    y = common.cpu_output((n, c, *size), x.dtype)
    places = common.empty_output(y, torch.uint8) if save else torch.empty(0, dtype=torch.uint8)
    vectors = [common.vector(t) for t in (weight, bias, mean, var)]
    _native.module().bn_act_max_pool_forward(
        _native.DTYPES[x.dtype], y.data_ptr(), places.data_ptr() if save else 0, x.data_ptr(),
        *(common.address(t) for t in vectors), eps, n, h, w, c, *size, *kernel, *stride, *padding, *dilation,
        torch.get_num_threads(),
    )  # fmt: skip
    return y, places


def bwd(
    dy: Tensor,
    places: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias as far as wanted (empty where not)."""
    dy, x, places = common.channels_last(dy), common.channels_last(x), common.channels_last(places)
    none, (n, c, h, w) = x.new_empty(0), x.shape
    dx = common.cpu_like(x) if wants[0] else none
    dweight, dbias = (torch.empty(c) if want else none.clone() for want in wants[1:3])
    gamma, mean, var = (common.vector(t) for t in (weight, mean, var))
    _native.module().bn_act_max_pool_backward(
        _native.DTYPES[x.dtype],
        *(t.data_ptr() if want else 0 for t, want in zip((dx, dweight, dbias), wants)),
        dy.data_ptr(), places.data_ptr(), x.data_ptr(), common.address(gamma), mean.data_ptr(), var.data_ptr(), eps,
        n, h, w, c, *dy.shape[2:], *kernel, *stride, *padding, *dilation, training, torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight, dbias
