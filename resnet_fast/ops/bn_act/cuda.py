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
    return "the cuda room has no bn_act backward yet"


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


def _workspace(x: Tensor, rows: int, channels: int) -> Tensor:
    return x.new_empty(cuda_room.call("bn_act_workspace", x, rows, channels), dtype=torch.float32)
