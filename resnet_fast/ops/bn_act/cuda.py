"""bn_act by the CUDA kernels: one pass over x in training where it fits the card, else two; two passes backward."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common, cuda_room, triton_common


def why_not(door: str, *args: object) -> str | None:
    """Dense CUDA tensors of one dtype: float32, bfloat16 or float16; per-channel vectors of any of these."""
    if door == "fwd":
        x, weight, bias, mean, var, residual = args[:6]
        return cuda_room.why_not(x, residual, vectors=(weight, bias, mean, var))
    if door == "statistics":
        return cuda_room.why_not(*args)
    dy, x, y, weight, bias, mean, var = args[:7]
    return cuda_room.why_not(dy, x, y, vectors=(weight, bias, mean, var))


def fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    passes: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and in training the batch's mean and biased variance (two empty vectors otherwise).

    `passes` (0: what fits, 1: several kernels, 2: one) is for tests and benchmarks.
    """
    kept = triton_common.kept_statistics(x) if training else None  # of a Triton convolution
    x, residual = cuda_room.dense(x), cuda_room.dense(residual)
    weight, bias = cuda_room.vector(weight), cuda_room.vector(bias)
    rows, channels = cuda_room.rows(x), x.shape[1]
    y = common.empty_output(x)
    if not training or kept is not None:
        mean, var = (cuda_room.vector(t) for t in kept or (mean, var))
        cuda_room.call("bn_act_inference", x, y, x, residual, weight, bias, mean, var, rows, channels, eps, relu)
        if training:
            return y, mean, var
        none = x.new_empty(0, dtype=torch.float32)
        return y, none, none.clone()
    mean, var = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    workspace = _workspace(x, rows, channels)
    arguments = (y, x, residual, weight, bias, mean, var, workspace, rows, channels, eps, relu, passes)
    cuda_room.call("bn_act_training", x, *arguments)
    return y, mean, var


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """The batch's mean and biased variance per channel, float32: those that came with x, else by a pass over it."""
    kept = triton_common.kept_statistics(x)
    if kept is not None:
        return kept
    x = cuda_room.dense(x)
    rows, channels = cuda_room.rows(x), x.shape[1]
    mean, var = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    cuda_room.call("bn_act_statistics", x, x, mean, var, _workspace(x, rows, channels), rows, channels)
    return mean, var


def bwd(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    relu: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual as far as wanted (empty where not)."""
    dy, x, y = cuda_room.dense(dy), cuda_room.dense(x), cuda_room.dense(y)
    weight, bias, mean, var = (cuda_room.vector(t) for t in (weight, bias, mean, var))
    rows, channels = cuda_room.rows(x), x.shape[1]
    dx = common.empty_output(x) if wants[0] else None
    dresidual = common.empty_output(dy) if wants[3] else None
    dweight = dbias = workspace = None
    if wants[1] or wants[2] or (training and wants[0]):
        dweight, dbias = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
        workspace = _workspace(x, rows, channels)
    if any(wants):
        tensors = (dx, dresidual, dweight, dbias, dy, x, y, weight, bias, mean, var, workspace)
        cuda_room.call("bn_act_backward", x, *tensors, rows, channels, eps, training, relu, False)
    return (
        dx if wants[0] else x.new_empty(0),
        dweight if wants[1] else x.new_empty(0),
        dbias if wants[2] else x.new_empty(0),
        dresidual if wants[3] else x.new_empty(0),
    )


def dx(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    count: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    """The input's gradient where dweight and dbias are the sums over `count` values of several processes' batches."""
    dy, x, y = cuda_room.dense(dy), cuda_room.dense(x), cuda_room.dense(y)
    rows, channels = cuda_room.rows(x), x.shape[1]
    out = common.empty_output(x)
    # The kernel divides by this process's rows; on the device, so that nothing waits for `count`.
    sums = (cuda_room.vector(t * (rows / count)) for t in (dweight, dbias))
    vectors = (cuda_room.vector(t) for t in (weight, bias, mean, var))
    tensors = (out, None, *sums, dy, x, y, *vectors, None)
    cuda_room.call("bn_act_backward", x, *tensors, rows, channels, eps, True, relu, True)
    return out


def _workspace(x: Tensor, rows: int, channels: int) -> Tensor:
    return x.new_empty(cuda_room.call("bn_act_workspace", x, rows, channels), dtype=torch.float32)
