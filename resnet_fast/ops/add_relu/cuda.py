"""add_relu by the CUDA kernels: one pass, NaN-correct."""

from __future__ import annotations

from torch import Tensor

from resnet_fast.ops import common, cuda_room


def why_not(door: str, a: Tensor, b: Tensor) -> str | None:
    """Dense CUDA tensors of one dtype: float32, bfloat16 or float16."""
    return cuda_room.why_not(a, b)


def fwd(x: Tensor, residual: Tensor) -> Tensor:
    """y = relu(x + residual)."""
    x, residual = cuda_room.dense(x), cuda_room.dense(residual)
    y = common.empty_output(x)
    cuda_room.call("add_relu", x, y, x, residual, x.numel())
    return y


def bwd(dy: Tensor, y: Tensor) -> Tensor:
    """The gradient of x and of residual."""
    dy, y = cuda_room.dense(dy), cuda_room.dense(y)
    dx = common.empty_output(y)
    cuda_room.call("add_relu_backward", y, dx, dy, y, y.numel())
    return dx
