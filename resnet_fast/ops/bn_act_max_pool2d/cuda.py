"""bn_act_max_pool2d by the CUDA kernels: forward in one pass; backward a gather through the places, then the norm's."""

from __future__ import annotations

from torch import Tensor

from resnet_fast.ops import cuda_room
from resnet_fast.ops.bn_act import cuda as bn_act
from resnet_fast.ops.max_pool2d import cuda as max_pool2d


def why_not(door: str, first: Tensor, *args: object) -> str | None:
    """CUDA tensors of one dtype: float32, bfloat16 or float16; per-channel vectors of any of these."""
    if door == "fwd":
        if first.shape[1] > 4096:  # the vectors lie in a block's 48 KB of shared memory
            return f"the cuda room takes up to 4096 channels, got {first.shape[1]}"
        return cuda_room.why_not(first, vectors=args[:4])
    return cuda_room.why_not(first, args[1], vectors=args[2:6])


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
    vectors = tuple(cuda_room.vector(t) for t in (weight, bias, mean, var))
    return max_pool2d.pool(x, vectors, eps, kernel, stride, padding, dilation, size, save)


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
    """dx, dweight, dbias as far as wanted (empty where not)."""
    g = max_pool2d.bwd(dy, places, *x.shape[2:], kernel, stride, padding, dilation)  # no tap has the place 255
    return bn_act.bwd(g, x, None, weight, bias, mean, var, training, eps, False, [*wants, False])[:3]
