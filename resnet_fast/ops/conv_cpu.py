"""The convolution kernels of the compiled module, as the cpu rooms of conv2d and conv_bn_act call them."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import _native, backends
from resnet_fast.ops import common

Sizes = tuple[int, ...]


def sizes(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Sizes:
    """The sizes of csrc/conv.h's ConvShape, in its order."""
    n, k, p, q = common.convolution_shape(x, weight, stride, padding, dilation)
    _, c, h, w = x.shape
    return (n, h, w, c, k, weight.shape[2], weight.shape[3], p, q, *stride, *padding, *dilation, groups)


def why_not(x: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    """Dense CPU tensors of one dtype, float32 or bfloat16; the weight float32 with either (the kernels pack it from that)."""
    if x.numel() == 0 or weight.numel() == 0:
        return "the cpu room leaves empty tensors to eager"
    given = (x, *others) if weight.dtype == torch.float32 and weight.device.type == "cpu" else (x, weight, *others)
    return common.cpu_why_not(*given)


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """act(conv(x, weight) scale + shift + residual), channels_last; the filters are packed at every call."""
    shape, x, filters = sizes(x, weight, stride, padding, dilation, groups), common.channels_last(x), _filters(weight)
    residual = None if residual is None else common.channels_last(residual)
    y = common.cpu_output((shape[0], shape[4], *shape[7:9]), x.dtype)
    epilogue = (common.address(scale), common.address(shift), common.address(residual), relu)
    place = (y.data_ptr(), x.data_ptr(), filters.data_ptr(), filters.stride())
    _native.module().conv_forward(
        shape, _native.DTYPES[x.dtype], *place, *epilogue, backends.is_exact(), torch.get_num_threads()
    )
    return y


def _filters(weight: Tensor) -> Tensor:
    """The filters as the kernels pack them: float32, of any strides."""
    return weight if weight.dtype == torch.float32 else weight.detach().float()


def backward_why_not(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wants: list[bool],
) -> str | None:
    """As `why_not`, and what the gradient kernels themselves refuse."""
    reason = why_not(dy, weight, x)
    if reason is not None:
        return reason
    shape, dtype = sizes(x, weight, stride, padding, dilation, groups), _native.DTYPES[x.dtype]
    if wants[0]:
        reason = _native.module().conv_data_gradient_why_not(shape, dtype, False)
    if reason is None and wants[1]:
        reason = _native.module().conv_wgrad_why_not(shape, dtype)  # what Winograd takes, the other one takes too
    return reason


def dgrad_onto_why_not(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    other: Tensor,
) -> str | None:
    """As `backward_why_not`; the kernels that add another gradient of x to dx are the convolutions', with their epilogue."""
    reason = why_not(dy, weight, x, other)
    if reason is not None:
        return reason
    shape = sizes(x, weight, stride, padding, dilation, groups)
    return _native.module().conv_data_gradient_why_not(shape, _native.DTYPES[x.dtype], True)


def data_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    other: Tensor | None = None,
) -> Tensor:
    """dx, plus another gradient of x where one is given (at stride 1 only).

    At stride 1 a convolution of dy by the filters with K and C exchanged and their taps reversed; at stride 2 by Winograd's
    algorithm where that can and `exact` does not forbid it.
    """
    shape, dy, filters = sizes(x, weight, stride, padding, dilation, groups), common.channels_last(dy), _filters(weight)
    dx, other = common.cpu_output(x.shape, x.dtype), None if other is None else common.channels_last(other)
    place = (dx.data_ptr(), dy.data_ptr(), filters.data_ptr(), filters.stride(), common.address(other))
    _native.module().conv_data_gradient(
        shape, _native.DTYPES[x.dtype], *place, backends.is_exact(), torch.get_num_threads()
    )
    return dx


def weight_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor | None:
    """dw, with the weight's strides: by Winograd where that can and `exact` does not forbid it.

    None where dy or x are not finite in a way that reaches other values than torch's.
    """
    shape, dtype = sizes(x, weight, stride, padding, dilation, groups), _native.DTYPES[x.dtype]
    dy, x, dw = common.channels_last(dy), common.channels_last(x), common.cpu_gradient(weight)
    place = (dw.data_ptr(), dw.stride(), dy.data_ptr(), x.data_ptr(), backends.is_exact(), torch.get_num_threads())
    return dw.to(weight.dtype) if _native.module().conv_weight_gradient(shape, dtype, *place) else None
