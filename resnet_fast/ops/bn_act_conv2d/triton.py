"""bn_act_conv2d by Triton: the convolution normalises what it loads, so the activation is never in memory."""

from __future__ import annotations

from torch import Tensor

from resnet_fast import backends
from resnet_fast.ops import common
from resnet_fast.ops import triton_common as rooms
from resnet_fast.ops.bn_act import triton as bn_act
from resnet_fast.ops.conv2d import triton as conv


def why_not(door: str, *args: object) -> str | None:
    """As conv2d; the norm's vectors in float32, bfloat16 or float16."""
    z, gamma, beta, mean, var, weight, bias, _, _, *window = args
    return rooms.why_not(z, weight, vectors=(gamma, beta, mean, var, bias)) or conv.refuse(z, weight, *window)


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
    """The convolution's output, and in training the batch's mean and biased variance (two empty vectors otherwise)."""
    if training:
        mean, var = bn_act.statistics(z)
    z = common.channels_last(z)
    before = conv.prologue(gamma, beta, mean, var, eps)
    window = (stride, padding, dilation, groups)
    if backends.is_normalised_next():
        out, *found = conv.forward_statistics(z, weight, bias, *window, before)
        rooms.keep_statistics(out, *found)
    else:
        out = common.empty_convolution(z, weight, stride, padding, dilation)
        conv.forward(z, weight, *window, out, dict(shift_ptr=bias) | before, False)
    none = mean.new_empty(0)
    return (out, mean, var) if training else (out, none, none.clone())
