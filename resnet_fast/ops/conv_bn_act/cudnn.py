"""conv_bn_act by the convolution cuDNN fuses inside torch: folded weights, bias, residual and ReLU in its epilogue.

`torch.cudnn_convolution_relu` and `torch.cudnn_convolution_add_relu` are little used: they are tested once on the card,
NaN among the values, before they may be chosen.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resnet_fast.ops import common
from resnet_fast.ops.conv_bn_act import eager

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def self_test(index: int | None) -> str | None:
    """Run a small convolution with and without a residual and compare it with eager; None when it is right."""
    device = torch.device("cuda", index)
    g = torch.Generator().manual_seed(0)
    x, w, r = (torch.randn(*s, generator=g).half().to(device) for s in ((1, 16, 5, 5), (16, 16, 3, 3), (1, 16, 5, 5)))
    x[0, 3, 4, 4] = float("nan")
    bias = torch.randn(16, generator=g).half().to(device)
    try:
        for residual in (None, r):
            args = (x, w, None, None, bias, None, None, residual, 0.0, True, [1, 1], [1, 1], [1, 1], 1)
            ours, theirs = fwd(*args), eager.fwd(*args)
            if not torch.equal(ours.isnan(), theirs.isnan()):
                return "cuDNN's fused ReLU turns NaN into 0 on this card"
            if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2, equal_nan=True):
                return "cuDNN's fused convolution gave wrong values in its self-test"
    except Exception as error:  # not in every build, not for every card
        return f"cuDNN's fused convolution cannot be called as expected ({error})"
    return None


def why_not(door: str, *args: object) -> str | None:
    """CUDA tensors of one dtype, float32, bfloat16 or float16, with a ReLU at the end."""
    x, weight, _, _, _, _, _, residual, _, relu = args[:10]
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"the cudnn room wants tensors on an NVIDIA card, got one on {x.device}"
    given = [t for t in (x, weight, residual) if t is not None]
    if any(t.dtype != x.dtype for t in given) or x.dtype not in DTYPES:
        return f"the cudnn room takes one dtype, float32, bfloat16 or float16, got {', '.join(str(t.dtype) for t in given)}"
    if not relu:
        return "the cudnn room's fused convolutions end in a ReLU"
    if x.numel() == 0:
        return "the cudnn room leaves empty tensors to eager"
    if not torch.backends.cudnn.enabled or not torch.backends.cudnn.is_available():
        return "cuDNN is not in this torch, or torch.backends.cudnn.enabled is False"
    return self_test(x.device.index)


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
    """relu(bn(conv(x)) + residual), channels_last."""
    if mean is None:  # a frozen model's: the norm is in the filters and in beta
        shift = bias if beta is None else beta
    else:
        scale, shift = common.scale_shift(bias, gamma, beta, mean, var, eps)
        weight = (weight * scale[:, None, None, None]).to(weight.dtype)
    x, weight = common.channels_last(x), common.channels_last(weight)
    shift = None if shift is None else shift.to(x.dtype)
    window = (stride, padding, dilation, groups)
    if residual is None:
        return common.as_output(torch.cudnn_convolution_relu(x, weight, shift, *window))
    residual = common.channels_last(residual)
    return common.as_output(torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, shift, *window))
