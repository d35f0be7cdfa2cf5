"""conv_bn_act with known statistics in plain torch: the specification, for every dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common


def why_not(door: str, *args: object) -> str | None:
    """Eager always can."""
    return None


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
    bias = beta if mean is None else bias
    y = torch.nn.functional.conv2d(common.channels_last(x), weight, bias, stride, padding, dilation, groups)
    if mean is not None:
        y = torch.nn.functional.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)
    if residual is not None:
        y = y + residual
    return common.as_output(torch.relu(y) if relu else y)
