"""conv_bn_act by the convolution oneDNN fuses inside torch: folded weights, residual in its epilogue.

`torch.ops.mkldnn._convolution_pointwise` is private to torch: it is probed and tested once before it may be chosen.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resnet_fast.ops import common
from resnet_fast.ops.conv_bn_act import eager


@functools.cache
def self_test() -> str | None:
    """Run a small convolution with residual and ReLU and compare it with eager; None when it is right."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    x, w = torch.randn(1, 16, 5, 5), torch.randn(16, 16, 3, 3)
    vectors, residual = [torch.rand(16) + 0.5 for _ in range(4)], torch.randn(1, 16, 5, 5)
    try:
        for r, relu in ((residual, True), (None, True), (None, False), (residual, False)):
            args = (x, w, None, *vectors, r, 1e-5, relu, [1, 1], [1, 1], [1, 1], 1)
            if not torch.allclose(fwd(*args), eager.fwd(*args), rtol=1e-4, atol=1e-4):
                return "torch.ops.mkldnn._convolution_pointwise gave wrong values in its self-test"
    except Exception as error:  # a private operator may change its signature
        return f"torch.ops.mkldnn._convolution_pointwise cannot be called as expected ({error})"
    return None


def why_not(door: str, x: Tensor, weight: Tensor, *args: object) -> str | None:
    """Dense CPU tensors of one dtype, float32 or bfloat16."""
    residual = args[5]
    if x.device.type != "cpu":
        return f"the onednn room wants CPU tensors, got one on {x.device}"
    given = [t for t in (x, weight, residual) if t is not None]
    if any(t.dtype != x.dtype for t in given) or x.dtype not in (torch.float32, torch.bfloat16):
        return f"the onednn room takes one dtype, float32 or bfloat16, got {', '.join(str(t.dtype) for t in given)}"
    if x.numel() == 0:
        return "the onednn room leaves empty tensors to eager"
    return self_test()


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
    folded = (weight * scale[:, None, None, None]).to(weight.dtype)
    shift = shift.to(weight.dtype)
    x = common.channels_last(x)
    pointwise = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        y = pointwise(x, folded, shift, padding, stride, dilation, groups, "none", [], "")
    else:
        residual = common.channels_last(residual)
        y = pointwise.binary(x, residual, folded, shift, padding, stride, dilation, groups, "add", 1.0, None, [], "")
    # Not as oneDNN's epilogue, which turns NaN into 0; in place, while y is still near.
    return common.as_output(y.relu_() if relu else y)
