"""add_relu by the C++ kernels: one pass, NaN-correct."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import _native
from resnet_fast.ops import common


def why_not(door: str, a: Tensor, b: Tensor) -> str | None:
    """Dense CPU tensors of one dtype, float32 or bfloat16."""
    return common.cpu_why_not(a, b)


def fwd(x: Tensor, residual: Tensor) -> Tensor:
    """y = relu(x + residual)."""
    x, residual = common.dense(x), common.dense(residual)
    y = common.cpu_like(x)
    _native.module().add_relu(
        _native.DTYPES[x.dtype], y.data_ptr(), x.data_ptr(), residual.data_ptr(), x.numel(), torch.get_num_threads()
    )
    return y


def bwd(dy: Tensor, y: Tensor) -> Tensor:
    """The gradient of x and of residual."""
    dy, y = common.dense(dy), common.dense(y)
    dx = common.cpu_like(y)
    _native.module().add_relu_backward(
        _native.DTYPES[y.dtype], dx.data_ptr(), dy.data_ptr(), y.data_ptr(), y.numel(), torch.get_num_threads()
    )
    return dx
