"""bn_act_conv2d in plain torch: the specification, for every dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common
from resnet_fast.ops.bn_act import eager as bn_act
from resnet_fast.ops.conv2d import eager as conv2d

F = torch.nn.functional


def why_not(door: str, *args: object) -> str | None:
    """Eager always can."""
    return None


def fwd(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    training: bool,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution's output, and in training the batch's mean and biased variance."""
    y, batch_mean, batch_var = bn_act.fwd(z, gamma, beta, mean, var, None, training, eps, True)
    return conv2d.fwd(y, weight, bias, stride, padding, dilation, groups), batch_mean, batch_var


def bwd(
    dout: Tensor,
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: bool,
    training: bool,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dz, dgamma, dbeta, dw, dbias as far as wanted (empty where not); with `training` mean and var are z's own."""
    window, first = (stride, padding, dilation, groups), any(wants[:3])
    y = bn_act.fwd(z, gamma, beta, mean, var, None, False, eps, True)[0]
    dy, dw, db = conv2d.bwd(dout, y, weight, bias, *window, [first, *wants[3:]])
    if not first:
        none = z.new_empty(0)
        return none, none.clone(), none.clone(), dw, db
    given = (gamma, beta, mean, var, training, eps, True, [*wants[:3], False])
    dz, dgamma, dbeta, _ = bn_act.bwd(dy, z, None, *given)
    return dz, dgamma, dbeta, dw, db


def differentiable(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    *window: list[int] | int,
) -> Tensor:
    """The convolution's output as a graph autograd can differentiate twice; with `training` mean and var are z's own."""
    statistics = (None, None) if training else (mean, var)
    weight, bias = common.rounded(weight, z), common.rounded(bias, z)
    return F.conv2d(torch.relu(F.batch_norm(z, *statistics, gamma, beta, training, 0.0, eps)), weight, bias, *window)
