"""residual_block by the doors of conv2d and bn_act, each step in the room chosen for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resnet_fast import backends
from resnet_fast.ops.residual_block import eager


def forward(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """As `eager.fwd`."""
    return eager.fwd_by(backends.run, x, *given)


def backward(dy: Tensor, x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """As `eager.bwd`."""
    return eager.bwd_by(backends.run, _onto, dy, x, *given)


def _onto(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    *window, other = rest

    def parts() -> Tensor:
        return backends.run("conv2d", "bwd", dy, x, weight, False, *window, [True, False, False])[0] + other

    return backends.run_whole("conv2d", "dgrad_onto", parts, dy, x, weight, *window, other)
