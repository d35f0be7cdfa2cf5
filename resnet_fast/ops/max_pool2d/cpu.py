"""max_pool2d by the C++ kernels: one byte per output for backward, which gathers instead of scattering."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import _native
from resnet_fast.ops import common


def why_not(door: str, first: Tensor, *args: object) -> str | None:
    """A CPU tensor, float32 or bfloat16."""
    if first.numel() == 0:
        return "the cpu room leaves empty tensors to eager"
    return common.cpu_why_not(first)


def fwd(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    size: list[int],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y and, if saved, each maximum's place in its window as uint8."""
    x = common.channels_last(x)
    n, c, h, w = x.shape
    y = common.cpu_output((n, c, *size), x.dtype)
    argmax = common.empty_output(y, torch.uint8) if save else torch.empty(0, dtype=torch.uint8)
    _native.module().max_pool_forward(
        _native.DTYPES[x.dtype], y.data_ptr(), argmax.data_ptr() if save else 0, x.data_ptr(), n, h, w, c, *size,
        *kernel, *stride, *padding, *dilation, torch.get_num_threads(),
    )  # fmt: skip
    return y, argmax


def bwd(
    dy: Tensor,
    argmax: Tensor,
    height: int,
    width: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """dx: every dy added where its maximum was."""
    dy = common.channels_last(dy)
    n, c, p, q = dy.shape
    dx = common.cpu_output((n, c, height, width), dy.dtype)
    _native.module().max_pool_backward(
        _native.DTYPES[dy.dtype], dx.data_ptr(), dy.data_ptr(), argmax.data_ptr(), n, height, width, c, p, q,
        *kernel, *stride, *padding, *dilation, torch.get_num_threads(),
    )  # fmt: skip
    return dx
