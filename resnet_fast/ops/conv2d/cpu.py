"""conv2d by the C++ kernels: register tiles, and Winograd for 3x3 at stride 1 unless `exact` forbids it."""

from __future__ import annotations

from torch import Tensor

from resnet_fast.ops import conv_cpu


def why_not(door: str, first: Tensor, second: Tensor, *args: object) -> str | None:
    """Dense CPU tensors of one dtype, float32 or bfloat16."""
    if door == "bwd":
        return "the cpu room of conv2d has no backward kernels; torch's are used"
    return conv_cpu.why_not(first, second, args[0])


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
    shift = None if bias is None else bias.float()
    return conv_cpu.run(x, weight, None, shift, None, False, stride, padding, dilation, groups)


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
    """Never reached: `why_not` refuses it."""
    raise NotImplementedError("the cpu room of conv2d has no backward kernels")
