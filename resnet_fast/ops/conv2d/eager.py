"""conv2d in plain torch: the specification, for every dtype and device."""

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
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The convolution's output, channels_last."""
    weight, bias = common.rounded(weight, x), common.rounded(bias, x)
    return common.as_output(
        torch.nn.functional.conv2d(common.channels_last(x), weight, bias, stride, padding, dilation, groups)
    )


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
    """dx, dw, dbias as far as wanted (empty where not); differentiable again."""
    none = x.new_empty(0)
    if not any(wants):
        return none, none.clone(), none.clone()
    dx, dw, db = torch.ops.aten.convolution_backward(
        common.channels_last(dy), common.channels_last(x), common.rounded(weight, x), [weight.shape[0]] if bias else None,
        stride, padding, dilation, False, [0, 0], groups, wants,
    )  # fmt: skip
    return (
        common.as_output(dx) if wants[0] else none,
        dw.to(weight.dtype) if wants[1] else none.clone(),
        db.to(weight.dtype) if wants[2] else none.clone(),
    )


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
    """dx and another gradient of x, added."""
    dx = bwd(dy, x, weight, False, stride, padding, dilation, groups, [True, False, False])[0]
    return dx + common.channels_last(other)
