"""max_pool2d by the CUDA kernels; one byte an output kept for backward."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common, cuda_room


def why_not(door: str, first: Tensor, *args: object) -> str | None:
    """A CUDA tensor of float32, bfloat16 or float16."""
    return cuda_room.why_not(first)


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
    return pool(x, (None,) * 4, 0.0, kernel, stride, padding, dilation, size, save)


def pool(x, vectors, eps, kernel, stride, padding, dilation, size, save) -> tuple[Tensor, Tensor]:
    """The kernel's two uses: plain pooling (vectors all None), or of relu(bn(x)) with (weight, bias, mean, var)."""
    x = cuda_room.dense(x)
    shape = (*x.shape[:2], *size)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=common.CHANNELS_LAST)
    places = torch.empty_like(y, dtype=torch.uint8) if save else None
    sizes = (x.shape[0], *x.shape[2:], x.shape[1], *size)
    window = (*kernel, *stride, *padding, *dilation)
    cuda_room.call("max_pool2d", x, y, places, x, *vectors, *sizes, eps, window)
    return y, places if save else x.new_empty(0, dtype=torch.uint8)


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
    dy, argmax = cuda_room.dense(dy), cuda_room.dense(argmax)
    shape = (*dy.shape[:2], height, width)
    dx = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=common.CHANNELS_LAST)
    sizes = (dy.shape[0], height, width, dy.shape[1], *dy.shape[2:])
    window = (*kernel, *stride, *padding, *dilation)
    cuda_room.call("max_pool2d_backward", dy, dx, dy, argmax, *sizes, window)
    return dx
