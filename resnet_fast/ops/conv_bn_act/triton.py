"""conv_bn_act by Triton: norm, residual and ReLU in the convolution's epilogue, on its float32 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common
from resnet_fast.ops import triton_common as rooms
from resnet_fast.ops.conv2d import triton as conv


def why_not(door: str, *args: object) -> str | None:
    """As conv2d; residual and vectors in float32, bfloat16 or float16."""
    x, weight, bias, gamma, beta, mean, var, residual, _, _, *geometry = args
    reason = rooms.why_not(x, weight, residual, vectors=(bias, gamma, beta, mean, var))
    return reason or conv.refuse(x, weight, *geometry)


def fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """relu(bn(conv(x)) + residual), channels_last; without mean and var the norm is in the filters, beta the bias."""
    out = common.empty_convolution(x, weight, stride, padding, dilation)
    if residual is not None:
        residual = common.channels_last(residual)
        out = common.empty_output(out, torch.result_type(out, residual))
    if mean is None:
        given = dict(residual_ptr=residual, shift_ptr=beta)
        conv.forward(x, weight, stride, padding, dilation, groups, out, given, relu)
        return out
    scale, shift = conv.folded_norm(weight.shape[0], bias, gamma, beta, mean, var, eps)
    epilogue = dict(residual_ptr=residual, scale_ptr=scale, shift_ptr=shift)
    conv.forward(x, weight, stride, padding, dilation, groups, out, epilogue, relu)
    return out
