"""bn_act_global_avg_pool2d by Triton: one pass forward, two backward; neither the map nor its gradient's source is written."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common
from resnet_fast.ops import triton_common as rooms
from resnet_fast.ops.bn_act import triton as bn_act

LIMIT = 2**31 - 1


def why_not(door: str, first: Tensor, *args: object) -> str | None:
    """float32, bfloat16 or float16 on a GPU (or in the interpreter); vectors in the same dtypes."""
    x, vectors, residual = (first, args[:4], args[4]) if door == "fwd" else (args[0], args[1:5], args[5])
    if x[:1].numel() > LIMIT:
        return f"the triton room counts an image's values in 32 bits, got {x[:1].numel()} of them"
    return rooms.why_not(first, x, residual, vectors=vectors)


def _tile(x: Tensor) -> dict[str, int]:
    """The constants: a program has all pixels of an image's channels, no more rows than there are pixels."""
    _, c, h, w = x.shape
    block_r, block_c = rooms.rows_tile(c, widest=bn_act.REDUCE)
    return dict(C=c, HW=h * w, BLOCK_R=min(block_r, rooms.next_power_of_2(h * w)), BLOCK_C=block_c)


def fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    """The mean over each image's pixels of relu(bn(x) + residual), by given statistics: (N, C, 1, 1)."""
    from resnet_fast.ops.bn_act_global_avg_pool2d.triton_kernels import bn_mean_forward

    x = common.channels_last(x)
    residual = None if residual is None else common.channels_last(residual)
    dtype = x.dtype if residual is None else torch.result_type(x, residual)
    n, c = x.shape[:2]
    y = torch.empty((n, c, 1, 1), dtype=dtype, device=x.device, memory_format=torch.channels_last)
    tile = _tile(x)
    args = dict(
        y_ptr=y, x_ptr=x, residual_ptr=residual, mean_ptr=mean, var_ptr=var, weight_ptr=weight, bias_ptr=bias,
        share=1 / tile["HW"], eps=eps,
    )  # fmt: skip
    rooms.launch(bn_mean_forward, (n, -(-c // tile["BLOCK_C"])), args, tile)
    return y


def bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    training: bool,
    eps: float,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual as far as wanted (empty where not)."""
    from resnet_fast.ops.bn_act_global_avg_pool2d.triton_kernels import bn_mean_backward_apply, bn_mean_backward_reduce

    x, dy = common.channels_last(x), dy.contiguous()
    residual = None if residual is None else common.channels_last(residual)
    n, c = x.shape[:2]
    m = x.numel() // c
    none = x.new_empty(0)
    dx = common.empty_output(x) if wants[0] and not training else None
    dresidual = common.empty_output(x, dy.dtype) if wants[3] else None
    sums = wants[1] or wants[2] or (wants[0] and training)
    part = x.new_empty(2, n, c, dtype=torch.float32) if sums else None
    norm = dict(mean_ptr=mean, var_ptr=var, weight_ptr=weight, bias_ptr=bias)
    tile = _tile(x)
    source = dict(dy_ptr=dy, x_ptr=x, residual_ptr=residual, **norm, share=1 / tile["HW"], eps=eps)
    if sums or wants[0] or wants[3]:
        args = source | dict(part_ptr=part, dresidual_ptr=dresidual, dx_ptr=dx)
        rooms.launch(bn_mean_backward_reduce, (n, -(-c // tile["BLOCK_C"])), args, tile)
    dweight = dbias = none
    if sums:
        dweight, dbias = bn_act.merge_gradients(part, var, eps)
    if wants[0] and training and dresidual is not None:  # the masked gradient is in memory: bn_act's own second pass
        given = (weight, bias, mean, var, dweight, dbias)
        dx = bn_act.gradient_apply(dresidual, x, None, *given, 1 / m, eps, False)
    elif wants[0] and training:
        dx = common.empty_output(x)
        args = source | dict(dx_ptr=dx, dweight_ptr=dweight, dbias_ptr=dbias, inverse=1 / m)
        rooms.launch(bn_mean_backward_apply, (n, -(-c // tile["BLOCK_C"])), args, tile)
    found = ((dx, wants[0]), (dweight, wants[1]), (dbias, wants[2]), (dresidual, wants[3]))
    return tuple(t if wanted else none.clone() for t, wanted in found)
