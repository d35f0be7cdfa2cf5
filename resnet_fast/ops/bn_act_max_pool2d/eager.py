"""bn_act_max_pool2d in plain torch: the specification, for every dtype and device."""

from __future__ import annotations

from torch import Tensor

from resnet_fast.ops.bn_act import eager as bn_act
from resnet_fast.ops.max_pool2d import eager as max_pool2d

#: The place of a maximum that is not above 0: its window gives no gradient.
NO_PLACE = 255


def why_not(door: str, *args: object) -> str | None:
    """Eager always can."""
    return None


def fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    size: list[int],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """max_pool2d(relu(bn(x))) and, if saved, each maximum's place in its window as uint8, 255 where it is not above 0."""
    y = bn_act.fwd(x, weight, bias, mean, var, None, False, eps, True)[0]
    y, places = max_pool2d.fwd(y, kernel, stride, padding, dilation, size, save)
    return y, places.masked_fill_(y <= 0, NO_PLACE) if save else places


def bwd(
    dy: Tensor,
    places: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias as far as wanted (empty where not); differentiable again."""
    g = unpooled(dy, places, x.shape[2], x.shape[3], kernel, stride, padding, dilation)
    return bn_act.bwd(g, x, None, weight, bias, mean, var, training, eps, False, [*wants, False])[:3]


def unpooled(dy: Tensor, places: Tensor, height: int, width: int, *window: list[int]) -> Tensor:
    """The gradient before the pool and the ReLU: every dy where its maximum was, if that was above 0."""
    dead = places == NO_PLACE
    return max_pool2d.bwd(dy.masked_fill(dead, 0), places.masked_fill(dead, 0), height, width, *window)
