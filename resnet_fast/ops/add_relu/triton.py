"""add_relu by Triton: one pass each way."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common
from resnet_fast.ops import triton_common as rooms

BLOCK = 2048


def why_not(door: str, a: Tensor, b: Tensor) -> str | None:
    """float32, bfloat16 or float16 on a GPU (or in the interpreter)."""
    return rooms.why_not(a, b)


def fwd(x: Tensor, residual: Tensor) -> Tensor:
    """y = relu(x + residual)."""
    from resnet_fast.ops.add_relu.triton_kernels import add_relu_forward

    x, residual = common.dense(x), common.dense(residual)
    y = common.empty_output(x, torch.result_type(x, residual))
    args = dict(y_ptr=y, x_ptr=x, residual_ptr=residual, n=x.numel())
    rooms.launch(add_relu_forward, (-(-x.numel() // BLOCK),), args, dict(BLOCK=BLOCK))
    return y


def bwd(dy: Tensor, y: Tensor) -> Tensor:
    """The gradient of x and of residual."""
    from resnet_fast.ops.add_relu.triton_kernels import add_relu_backward

    dy, y = common.dense(dy), common.dense(y)
    dx = common.empty_output(y)
    args = dict(dx_ptr=dx, dy_ptr=dy, y_ptr=y, n=y.numel())
    rooms.launch(add_relu_backward, (-(-y.numel() // BLOCK),), args, dict(BLOCK=BLOCK))
    return dx
