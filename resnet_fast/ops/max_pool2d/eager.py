"""max_pool2d in plain torch: the specification, for every dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common

aten = torch.ops.aten


def why_not(door: str, *args: object) -> str | None:
    """Eager always can."""
    return None


def fwd(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    size: list[int],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y and, if saved, each maximum's place in its window as uint8."""
    ceil_mode = size != [
        common.conv_output_size(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1)
    ]
    x = common.channels_last(x)
    if not save:
        y = torch.nn.functional.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
        return common.as_output(y), x.new_empty(0, dtype=torch.uint8)
    y, flat = aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)
    p0, q0 = _origins(size, stride, padding, x.device)
    r = (flat // x.shape[3] - p0) // dilation[0]
    s = (flat % x.shape[3] - q0) // dilation[1]
    return common.as_output(y), common.as_output((r * kernel[1] + s).to(torch.uint8))


def bwd(
    dy: Tensor,
    argmax: Tensor,
    height: int,
    width: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """dx: every dy added where its maximum was; differentiable again."""
    n, c, *size = dy.shape
    p0, q0 = _origins(size, stride, padding, dy.device)
    place = argmax.long()
    # The clamp is for the windows bn_act_max_pool2d has switched off: no gradient, and no place that must be inside.
    flat = (p0 + place // kernel[1] * dilation[0]) * width + q0 + place % kernel[1] * dilation[1]
    flat = flat.clamp(0, max(0, height * width - 1))
    dx = dy.new_zeros(n, c, height * width).scatter_add(2, flat.flatten(2), dy.flatten(2))
    return common.as_output(dx.view(n, c, height, width))


def _origins(size, stride, padding, device) -> tuple[Tensor, Tensor]:
    rows = torch.arange(size[0], device=device) * stride[0] - padding[0]
    columns = torch.arange(size[1], device=device) * stride[1] - padding[1]
    return rows[:, None], columns[None, :]
