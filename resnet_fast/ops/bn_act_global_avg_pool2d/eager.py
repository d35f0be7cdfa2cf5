"""bn_act_global_avg_pool2d in plain torch: the specification, for every dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common
from resnet_fast.ops.bn_act import eager as bn_act


def why_not(door: str, *args: object) -> str | None:
    """Eager always can."""
    return None


def fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    """The mean over each image's pixels of relu(bn(x) + residual), by given statistics: (N, C, 1, 1)."""
    return pooled(bn_act.fwd(x, weight, bias, mean, var, residual, False, eps, True)[0])


def bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    training: bool,
    eps: float,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual as far as wanted (empty where not)."""
    y = bn_act.fwd(x, weight, bias, mean, var, residual, False, eps, True)[0]
    return bn_act.bwd(spread(dy, x), x, y, weight, bias, mean, var, training, eps, True, wants)


def pooled(y: Tensor) -> Tensor:
    """The mean over each image's pixels."""
    return common.as_output(y.mean((2, 3), keepdim=True))


def spread(dy: Tensor, x: Tensor) -> Tensor:
    """The map's gradient: every pixel has its share of dy."""
    return (dy / (x.shape[2] * x.shape[3])).expand(x.shape)


def differentiable(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
) -> Tensor:
    """The output as a graph autograd can differentiate twice; with `training` mean and var are x's own."""
    statistics = (None, None) if training else (mean, var)
    y = torch.nn.functional.batch_norm(x, *statistics, gamma, beta, training, 0.0, eps)
    y = y if residual is None else y + residual
    return torch.relu(y).mean((2, 3), keepdim=True)
