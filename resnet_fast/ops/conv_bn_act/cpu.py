"""conv_bn_act by the C++ kernels: scale, shift, residual and ReLU in the epilogue (or the scale in the packed filters)."""

from __future__ import annotations

from torch import Tensor

from resnet_fast.ops import common, conv_cpu


def why_not(door: str, x: Tensor, weight: Tensor, *args: object) -> str | None:
    """Dense CPU tensors of one dtype, float32 or bfloat16."""
    return conv_cpu.why_not(x, weight, args[5])


def fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """relu(bn(conv(x)) + residual), channels_last."""
    scale, shift = common.scale_shift(bias, gamma, beta, mean, var, eps)
    scale, shift = scale.float(), shift.float()
    return conv_cpu.run(x, weight, scale, shift, residual, relu, stride, padding, dilation, groups)
