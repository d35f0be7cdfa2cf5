"""The contract of max_pool2d."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import _library
from resnet_fast.ops import common
from resnet_fast.ops.max_pool2d import eager


def max_pool2d(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Max pooling whose backward needs one byte per output instead of eight.

    Shape:
        x: (N, C, H, W) in any memory format, channels_last is native; output: (N, C, P, Q) channels_last, P and Q as
        torch computes them.
    Maths:
        y = the largest of each window, NaN kept; the gradient goes to the first largest, as torch's.
    Cost:
        x read once, y written once. Saved for backward: the place of the maximum in its window, one byte per output.
        Windows of more than 255 places are left to torch.nn.functional.max_pool2d.
    Raises:
        RuntimeError: x is not four-dimensional, padding above half the window, an empty output.
        NotImplementedError: a dtype that is not floating. TypeError: a window that is not of ints.
    Source:
        torch.nn.functional.max_pool2d, whose values and argument order these are.
    """
    common.check_4d("max_pool2d", "x", x)
    kernel = common.pair("kernel_size", kernel_size)
    stride = kernel if stride is None else common.pair("stride", stride)
    padding, dilation = common.pair("padding", padding), common.pair("dilation", dilation)
    if kernel[0] * kernel[1] > 255:
        return torch.nn.functional.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    size = output_size(x, kernel, stride, padding, dilation, ceil_mode)
    arguments = (list(kernel), list(stride), list(padding), list(dilation), size)
    return _forward(x, *arguments, _library.needs_grad(x))[0]


def output_size(x, kernel, stride, padding, dilation, ceil_mode) -> list[int]:
    """P and Q; refuses what torch refuses."""
    if min(kernel) < 1 or min(stride) < 1 or min(dilation) < 1:
        raise RuntimeError(
            f"max_pool2d: wanted positive sizes, got kernel {kernel}, stride {stride}, dilation {dilation}"
        )
    if any(p < 0 or 2 * p > k for p, k in zip(padding, kernel)):
        raise RuntimeError(f"max_pool2d: wanted padding between 0 and half the kernel {kernel}, got {padding}")
    size = []
    for i in (0, 1):
        room = x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1
        steps = -(-room // stride[i]) if ceil_mode else room // stride[i]
        if ceil_mode and steps * stride[i] >= x.shape[2 + i] + padding[i]:
            steps -= 1  # a window must start inside the image or its left padding
        size.append(steps + 1)
    if min(size) < 1 or x.shape[1] == 0:
        raise RuntimeError(
            f"max_pool2d: the output would be empty: x {tuple(x.shape)}, kernel {kernel}, padding {padding}"
        )
    return size


def _fake(x, kernel, stride, padding, dilation, size, save):
    y = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, common.empty_output(y, torch.uint8) if save else x.new_empty(0, dtype=torch.uint8)


def _fake_backward(dy, argmax, height, width, kernel, stride, padding, dilation):
    shape = (*dy.shape[:2], height, width)
    return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)


def _setup(ctx, inputs, output) -> None:
    x, *ctx.window, _, _ = inputs
    ctx.x = (x.shape[2], x.shape[3], x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last))
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(*(output[1:] if inputs[-1] else output))  # without the places there is no gradient


def _backward(ctx, dy: Tensor, _):
    (argmax,) = ctx.saved_tensors
    height, width, plain = ctx.x
    formula = eager.bwd if torch.is_grad_enabled() else _gradient
    dx = formula(dy, argmax, height, width, *ctx.window)
    return dx.contiguous() if plain else dx, *(None,) * 6


_forward = _library.define(
    "max_pool2d",
    "(Tensor x, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, int[2] size, bool save) -> (Tensor, Tensor)",
    fake=_fake,
)
_gradient = _library.define(
    "max_pool2d_backward",
    "(Tensor dy, Tensor argmax, int height, int width, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation) "
    "-> Tensor",
    door="bwd",
    op="max_pool2d",
    fake=_fake_backward,
)
_library.autograd("max_pool2d", _setup, _backward)
