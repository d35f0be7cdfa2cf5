"""The contract of conv2d."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import _library, backends
from resnet_fast.ops import common
from resnet_fast.ops.conv2d import eager, parts


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Two-dimensional convolution, by the fastest of this package's kernels and the library's.

    Shape:
        x: (N, C, H, W) in any memory format, channels_last is native; weight: (K, C / groups, R, S); bias: (K,) or
        None; output: (N, K, P, Q) channels_last with P = floor((H + 2 padding - dilation (R - 1) - 1) / stride) + 1.
        One floating dtype; autocast casts x, weight and bias (on CPUs the rooms round the latter two).
    Maths:
        y[n, k, p, q] = bias[k] + sum over c, r, s of w[k, c, r, s] x[n, c, p stride + r dilation - padding, ...].
    Cost:
        2 N P Q K R S C / groups flops; x, weight read once and y written once at best. Saved for backward: x, weight.
    Raises:
        RuntimeError: shapes that do not fit together (the message has both), an empty output, several dtypes or devices.
        NotImplementedError: a dtype that is not floating. TypeError: a stride, padding or dilation that is not of ints.
    Source:
        torch.nn.functional.conv2d, whose values and argument order these are.
    """
    x, stride, padding, dilation = common.convolution_arguments(
        "conv2d", x, weight, bias, stride, padding, dilation, groups
    )
    return _forward(x, weight, bias, stride, padding, dilation, groups)


def with_input(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """`conv2d`, and x once more for the shortcut of a residual block.

    The gradient that comes back through the shortcut is added in the epilogue of the data gradient where a room has that:
    it is read once, instead of both gradients read and their sum written.
    """
    x, *window = common.convolution_arguments("conv2d", x, weight, bias, stride, padding, dilation, groups)
    return _forward.with_input(x, weight, bias, *window, groups)


def _fake(x, weight, bias, stride, padding, dilation, groups):
    return common.empty_convolution(x, weight, stride, padding, dilation)


def _fake_backward(dy, x, weight, bias, stride, padding, dilation, groups, wants):
    return common.empty_convolution_gradients(x, weight, wants)


def gradients(dy, x, weight, bias, stride, padding, dilation, groups, wants) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw, dbias as far as wanted (empty where not).

    Two calls of the room's door: the data gradient and the weight gradient are different convolutions, and the fastest
    room of the one need not be that of the other.
    """
    given = (dy, x, weight, bias, stride, padding, dilation, groups)
    dx = dw = db = None
    if wants[0]:
        dx = backends.run("conv2d", "bwd", *given, [True, False, False])[0]
    if wants[1] or wants[2]:
        _, dw, db = backends.run("conv2d", "bwd", *given, [False, *wants[1:]])
    none = x.new_empty(0)
    return (
        none if dx is None else dx,
        common.like_weight(dw, weight) if wants[1] else none.clone(),
        db if wants[2] else none.clone(),
    )


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias = bias is not None


def _backward(ctx, dy: Tensor):
    x, weight = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:3])
    # A graph of the gradient is wanted: torch's own backward operators can be differentiated again, ours cannot.
    formula = eager.bwd if torch.is_grad_enabled() else _gradient
    dx, dw, db = formula(dy, x, weight, ctx.bias, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, wants)
    return (
        common.like_input(dx, x) if wants[0] else None,
        dw if wants[1] else None,
        db if wants[2] else None,
        None,
        None,
        None,
        None,
    )


def _joined(ctx, dy: Tensor, other: Tensor):
    x, weight = ctx.saved_tensors
    window, wants = (ctx.stride, ctx.padding, ctx.dilation, ctx.groups), list(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled() or other.dtype != x.dtype:
        dx, *rest = _backward(ctx, dy)
        return dx + other, *rest

    dx = parts.data_gradient_onto(dy, x, weight, *window, other)
    _, dw, db = gradients(dy, x, weight, ctx.bias, *window, [False, *wants[1:]])
    return common.like_input(dx, x), dw if wants[1] else None, db if wants[2] else None, *(None,) * 4


_forward = _library.define(
    "conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
    fake=_fake,
)
_gradient = _library.compose(
    "conv2d_backward",
    "(Tensor dy, Tensor x, Tensor weight, bool bias, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "bool[3] wants) -> (Tensor, Tensor, Tensor)",
    run=gradients,
    fake=_fake_backward,
)
_library.autograd("conv2d", _setup, _backward, _joined)
_library.autocast("conv2d", ("x", "weight", "bias"), rounded_by_rooms=("weight", "bias"))
