"""bn_act_max_pool2d by Triton: one pass forward, two backward; the normalised map is neither written nor read."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common
from resnet_fast.ops import triton_common as rooms
from resnet_fast.ops.bn_act import triton as bn_act

STEPS = 2  # tiles of rows per program of the apply kernel; its tiles read up to four windows each


def why_not(door: str, first: Tensor, *args: object) -> str | None:
    """float32, bfloat16 or float16 on a GPU (or in the interpreter); vectors in the same dtypes."""
    if door == "fwd":
        return rooms.why_not(first, vectors=args[:4])
    return rooms.why_not(first, args[1], vectors=args[2:6])


def _sizes(x: Tensor, p: int, q: int, kernel, stride, padding, dilation) -> dict[str, int]:
    _, c, h, w = x.shape
    return dict(
        C=c, H=h, W=w, P=p, Q=q, R=kernel[0], S=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
        PAD_H=padding[0], PAD_W=padding[1], DIL_H=dilation[0], DIL_W=dilation[1],
    )  # fmt: skip


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
    from resnet_fast.ops.bn_act_max_pool2d.triton_kernels import bn_pool_forward

    x = common.channels_last(x)
    n, c = x.shape[:2]
    y = torch.empty((n, c, *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    places = common.empty_output(y, torch.uint8) if save else None
    block_m, block_c = rooms.rows_tile(c, 1024)
    args = dict(
        y_ptr=y, places_ptr=places, x_ptr=x, mean_ptr=mean, var_ptr=var, weight_ptr=weight, bias_ptr=bias,
        pixels=n * size[0] * size[1], eps=eps,
    )  # fmt: skip
    tile = dict(BLOCK_M=block_m, BLOCK_C=block_c)
    grid = (-(-n * size[0] * size[1] // block_m), -(-c // block_c))
    rooms.launch(bn_pool_forward, grid, args, _sizes(x, *size, kernel, stride, padding, dilation) | tile)
    return y, places if save else x.new_empty(0, dtype=torch.uint8)


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
    from resnet_fast.ops.bn_act_max_pool2d.triton_kernels import bn_pool_backward_apply, bn_pool_backward_reduce

    dy, x, places = common.channels_last(dy), common.channels_last(x), common.channels_last(places)
    c = x.shape[1]
    m = x.numel() // c
    sizes = _sizes(x, *dy.shape[2:], kernel, stride, padding, dilation)
    dx = common.empty_output(x) if wants[0] else None
    sums = wants[1] or wants[2] or (wants[0] and training)
    block_r, block_c = rooms.rows_tile(c, 1024, widest=bn_act.REDUCE)
    rows = rooms.chunk_rows(m, c, block_r, block_c, x.device)
    chunks = -(-m // rows)
    part = x.new_empty(2, chunks, c, dtype=torch.float32) if sums else None
    given = dict(dy_ptr=dy, places_ptr=places, x_ptr=x, mean_ptr=mean, var_ptr=var, weight_ptr=weight, M=m, eps=eps)
    if sums or wants[0]:
        args = given | dict(part_ptr=part, dx_ptr=None if training else dx, rows=rows)
        tile = dict(BLOCK_R=block_r, BLOCK_C=block_c)
        rooms.launch(bn_pool_backward_reduce, (chunks, -(-c // block_c)), args, sizes | tile)
    none = x.new_empty(0)
    dweight = dbias = none
    if sums:
        dweight, dbias = bn_act.merge_gradients(part, var, eps)
    if wants[0] and training:
        block_r, block_c = rooms.rows_tile(c, 1024)
        args = given | dict(dx_ptr=dx, dweight_ptr=dweight, dbias_ptr=dbias, inverse=1 / m)
        tile = dict(STEPS=STEPS, BLOCK_R=block_r, BLOCK_C=block_c)
        grid = (-(-m // (STEPS * block_r)), -(-c // block_c))
        rooms.launch(bn_pool_backward_apply, grid, args, sizes | tile)
    return dx if wants[0] else none, dweight if wants[1] else none.clone(), dbias if wants[2] else none.clone()
