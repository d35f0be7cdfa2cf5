"""The contract of add_relu."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import _library
from resnet_fast.ops import common
from resnet_fast.ops.add_relu import eager


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """The end of a residual block in one pass: the sum of two tensors, then ReLU.

    Shape:
        x, residual: the same shape, any floating dtype; the output is channels_last where they have four dimensions.
        Different dtypes promote as in torch.
    Maths:
        y = max(x + residual, 0), NaN kept; dx = dresidual = dy where not y <= 0, else 0.
    Cost:
        Two reads and one write of the tensor (torch: three reads, two writes). Saved for backward: y.
    Raises:
        RuntimeError: the shapes or the devices differ.
        NotImplementedError: a dtype that is not floating.
    Source:
        He et al., Deep Residual Learning for Image Recognition, 2015, section 3.2.
    """
    if x.shape != residual.shape:
        raise RuntimeError(
            f"add_relu: wanted two tensors of one shape, got {tuple(x.shape)} and {tuple(residual.shape)}"
        )
    common.check_floating("add_relu", "x", x)
    common.check_floating("add_relu", "residual", residual)
    common.check_same_device("add_relu", x=x, residual=residual)
    return _forward(x, residual)


def _fake(x: Tensor, residual: Tensor) -> Tensor:
    return common.empty_output(x, torch.result_type(x, residual))


def _fake_backward(dy: Tensor, y: Tensor) -> Tensor:
    return common.empty_output(y)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(output)
    ctx.dtypes = [t.dtype for t in inputs]


def _backward(ctx, dy: Tensor):
    (y,) = ctx.saved_tensors
    d = eager.bwd(dy, y) if torch.is_grad_enabled() else _gradient(dy, y)
    return tuple(d.to(dtype) for dtype in ctx.dtypes)


_forward = _library.define("add_relu", "(Tensor x, Tensor residual) -> Tensor", fake=_fake)
_gradient = _library.define(
    "add_relu_backward", "(Tensor dy, Tensor y) -> Tensor", door="bwd", op="add_relu", fake=_fake_backward
)
_library.autograd("add_relu", _setup, _backward)
