"""conv2d by the C++ kernels: register tiles, Winograd for 3x3 and Strassen for 1x1 unless `exact` forbids them.

Backward: the weight gradient as a register tile over pixels; the data gradient by residue classes of the stride, so that
no tap is wasted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common, conv_cpu
from resnet_fast.ops.conv2d import eager


def why_not(door: str, first: Tensor, second: Tensor, *args: object) -> str | None:
    """Dense CPU tensors of one dtype, float32 or bfloat16; the weight may be float32."""
    if door == "fwd":  # the bias is an epilogue's vector, of any floating dtype
        return conv_cpu.why_not(first, second)
    if door == "dgrad_onto":
        weight, *window, other = args
        return conv_cpu.dgrad_onto_why_not(first, second, weight, *window, other)
    return conv_cpu.backward_why_not(first, second, *args)


def fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The convolution's output, channels_last."""
    shift = None if bias is None else bias.float()
    return conv_cpu.run(x, weight, None, shift, None, False, stride, padding, dilation, groups)


def bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw, dbias as far as wanted (empty where not)."""
    none, window = x.new_empty(0), (stride, padding, dilation, groups)
    dy = common.channels_last(dy)  # once for the weight's and the bias's gradient, whose sums then have one order
    dx = conv_cpu.data_gradient(dy, x, weight, *window) if wants[0] else none
    dw = conv_cpu.weight_gradient(dy, x, weight, *window) if wants[1] else none.clone()
    if dw is None:
        dw = eager.bwd(dy, x, weight, bias, *window, [False, True, False])[1]
        dw = common.like_weight(dw, weight)
    db = dy.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype) if wants[2] else none.clone()
    return dx, dw, db


def whole_unmeasured(door: str) -> bool:
    """The data gradient's own kernel, its epilogue reading what a sum would read again."""
    return door == "dgrad_onto"


def dgrad_onto(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    other: Tensor,
) -> Tensor:
    """dx and another gradient of x, added in the epilogue."""
    return conv_cpu.data_gradient(dy, x, weight, stride, padding, dilation, groups, other)
