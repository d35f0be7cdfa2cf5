"""bn_act by the CUDA kernels: one pass over x in training where it fits the card, else two; two passes backward."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common, cuda_room


def why_not(door: str, *args: object) -> str | None:
    """Dense CUDA tensors of one dtype: float32, bfloat16 or float16; per-channel vectors of any of these."""
    if door == "fwd":
        x, weight, bias, mean, var, residual = args[:6]
        return cuda_room.why_not(x, residual, vectors=(weight, bias, mean, var))
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
    x, residual = cuda_room.dense(x), cuda_room.dense(residual)
    weight, bias = cuda_room.vector(weight), cuda_room.vector(bias)
    rows, channels = cuda_room.rows(x), x.shape[1]
    y = common.empty_output(x)
    if not training:
        mean, var = cuda_room.vector(mean), cuda_room.vector(var)
        cuda_room.call("bn_act_inference", x, y, x, residual, weight, bias, mean, var, rows, channels, eps, relu)
        none = x.new_empty(0, dtype=torch.float32)
        return y, none, none.clone()
    mean, var = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    workspace = _workspace(x, rows, channels)
    arguments = (y, x, residual, weight, bias, mean, var, workspace, rows, channels, eps, relu, passes)
    cuda_room.call("bn_act_training", x, *arguments)
    return y, mean, var


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
        cuda_room.call("bn_act_backward", x, *tensors, rows, channels, eps, training, relu)
    return (
        dx if wants[0] else x.new_empty(0),
        dweight if wants[1] else x.new_empty(0),
        dbias if wants[2] else x.new_empty(0),
        dresidual if wants[3] else x.new_empty(0),
    )


def _workspace(x: Tensor, rows: int, channels: int) -> Tensor:
    return x.new_empty(cuda_room.call("bn_act_workspace", x, rows, channels), dtype=torch.float32)
