"""max_pool2d by the CUDA kernels, and the stem's pool(relu(bn(x))) in one pass; one byte an output kept for backward."""

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
    return _pool(x, (None,) * 4, 0.0, kernel, stride, padding, dilation, size, save)


def bn_relu_fwd(
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
    """max_pool2d(relu(bn(x))) with given statistics, for the end of a stem: the activation is never stored.

    Its gradient is `bwd` with `y`, then bn_act's with `relu=False`.
    """
    vectors = tuple(cuda_room.vector(t) for t in (weight, bias, mean, var))
    return _pool(x, vectors, eps, kernel, stride, padding, dilation, size, save)


def _pool(x, vectors, eps, kernel, stride, padding, dilation, size, save) -> tuple[Tensor, Tensor]:
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
    y: Tensor | None = None,
) -> Tensor:
    """dx: every dy added where its maximum was. With `y`, the pooled output of relu: only where y is not <= 0."""
    dy, argmax, y = cuda_room.dense(dy), cuda_room.dense(argmax), cuda_room.dense(y)
    shape = (*dy.shape[:2], height, width)
    dx = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=common.CHANNELS_LAST)
    sizes = (dy.shape[0], height, width, dy.shape[1], *dy.shape[2:])
    window = (*kernel, *stride, *padding, *dilation)
    cuda_room.call("max_pool2d_backward", dy, dx, dy, argmax, y, *sizes, window)
    return dx
