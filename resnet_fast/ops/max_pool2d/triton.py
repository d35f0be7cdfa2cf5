"""max_pool2d by Triton: one pass each way, one byte of argmax per output."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common
from resnet_fast.ops import triton_common as rooms


def why_not(door: str, x: Tensor, *args: object) -> str | None:
    """float32, bfloat16 or float16 on a GPU (or in the interpreter)."""
    return rooms.why_not(x)


def _window(c, h, w, p, q, kernel, stride, padding, dilation) -> dict[str, int]:
    block_m, block_c = rooms.rows_tile(c, 1024)
    return dict(
        C=c, H=h, W=w, P=p, Q=q, R=kernel[0], S=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
        PAD_H=padding[0], PAD_W=padding[1], DIL_H=dilation[0], DIL_W=dilation[1], BLOCK_M=block_m, BLOCK_C=block_c,
    )  # fmt: skip


def _grid(pixels: int, constants: dict[str, int]) -> tuple[int, int]:
    return -(-pixels // constants["BLOCK_M"]), -(-constants["C"] // constants["BLOCK_C"])


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
    from resnet_fast.ops.max_pool2d.triton_kernels import max_pool_forward

    x = common.channels_last(x)
    n, c, h, w = x.shape
    p, q = size
    y = torch.empty((n, c, p, q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    argmax = common.empty_output(y, torch.uint8) if save else None
    constants = _window(c, h, w, p, q, kernel, stride, padding, dilation)
    args = dict(y_ptr=y, argmax_ptr=argmax, x_ptr=x, pixels=n * p * q)
    rooms.launch(max_pool_forward, _grid(n * p * q, constants), args, constants)
    return y, argmax if save else x.new_empty(0, dtype=torch.uint8)


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
    from resnet_fast.ops.max_pool2d.triton_kernels import max_pool_backward

    dy, argmax = common.channels_last(dy), common.channels_last(argmax)
    n, c, p, q = dy.shape
    dx = torch.empty((n, c, height, width), dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    constants = _window(c, height, width, p, q, kernel, stride, padding, dilation)
    args = dict(dx_ptr=dx, dy_ptr=dy, argmax_ptr=argmax, pixels=n * height * width)
    rooms.launch(max_pool_backward, _grid(n * height * width, constants), args, constants)
    return dx
