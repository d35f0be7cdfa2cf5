"""recomputed_conv_bn_act in plain torch: the specification, for every dtype and device."""

from __future__ import annotations

from torch import Tensor

from resnet_fast.ops.bn_act import eager as bn_act
from resnet_fast.ops.bn_act_max_pool2d import eager as bn_act_max_pool2d
from resnet_fast.ops.conv2d import eager as conv2d


def why_not(door: str, *args: object) -> str | None:
    """Eager always can."""
    return None


def fwd(
    x: Tensor,
    gamma0: Tensor | None,
    beta0: Tensor | None,
    mean0: Tensor | None,
    var0: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    before: bool,
    eps0: float,
    eps: float,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pool: list[int],
) -> Tensor:
    """The output; statistics that are None are the batch's."""
    if before:
        x = bn_act.fwd(x, gamma0, beta0, mean0, var0, None, mean0 is None, eps0, True)[0]
    z = conv2d.fwd(x, weight, bias, stride, padding, dilation, groups)
    if not pool:
        return bn_act.fwd(z, gamma, beta, mean, var, residual, mean is None, eps, relu)[0]
    if mean is None:
        mean, var = bn_act.statistics(z)
    return bn_act_max_pool2d.fwd(z, gamma, beta, mean, var, eps, *windows(pool), False)[0]


def windows(pool: list[int]) -> list[list[int]]:
    """Kernel, stride, padding, dilation and output size, which a schema has as one list."""
    return [list(pool[i : i + 2]) for i in range(0, 10, 2)]
