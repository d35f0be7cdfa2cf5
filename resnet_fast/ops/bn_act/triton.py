"""bn_act by Triton: statistics, apply; backward reduce, apply. No atomics: the same bits every time."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common
from resnet_fast.ops import triton_common as rooms

STEPS = 4  # tiles of rows per program of the apply kernels: the channel vectors are loaded once for all of them
REDUCE = 64  # channels per program of the reductions: more programs than the apply kernels' 128 give
MERGE = (64, 16)  # partial results are few: narrow tiles give the merge several programs


def why_not(door: str, *args: object) -> str | None:
    """float32, bfloat16 or float16 on a GPU (or in the interpreter); vectors in the same dtypes."""
    if door == "fwd":
        x, weight, bias, mean, var, residual, *_ = args
        return rooms.why_not(x, residual, vectors=(weight, bias, mean, var))
    if door == "statistics":
        return rooms.why_not(*args)
    dy, x, y, weight, bias, mean, var, *_ = args
    return rooms.why_not(dy, x, y, vectors=(weight, bias, mean, var))


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """The batch's mean and biased variance per channel, float32: those that came with x, else by a pass over it."""
    from resnet_fast.ops.bn_act.triton_kernels import bn_statistics

    kept = rooms.kept_statistics(x)
    if kept is not None:
        return kept
    x = common.channels_last(x)
    m, c = _rows(x), x.shape[1]
    block_r, block_c = rooms.rows_tile(c, widest=REDUCE)
    rows = rooms.chunk_rows(m, c, block_r, block_c, x.device)
    chunks = -(-m // rows)
    part = x.new_empty(2, chunks, c, dtype=torch.float32)
    tile = dict(C=c, BLOCK_R=block_r, BLOCK_C=block_c)
    rooms.launch(bn_statistics, (chunks, -(-c // block_c)), dict(x_ptr=x, part_ptr=part, M=m, rows=rows), tile)
    return merge(part, m, rows)


def merge(part: Tensor, m: int, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of m rows out of part[2, chunks, C]: mean, squared deviations of every `rows` rows."""
    from resnet_fast.ops.bn_act.triton_kernels import bn_merge

    _, chunks, c = part.shape
    tile = dict(C=c, BLOCK_R=MERGE[0], BLOCK_C=MERGE[1])
    if chunks > 16 * MERGE[0]:  # one program per 16 channels would take too long over them: groups first
        groups = -(-chunks // MERGE[0])
        merged = part.new_empty(2, groups, c)
        args = dict(mean_ptr=merged[0], var_ptr=merged[1], part_ptr=part, M=m, rows=rows, chunks=chunks, per=MERGE[0])
        rooms.launch(bn_merge, (-(-c // MERGE[1]), groups), args, tile | dict(FINAL=False))
        part, rows, chunks = merged, rows * MERGE[0], groups
    mean, var = part.new_empty(c), part.new_empty(c)
    args = dict(mean_ptr=mean, var_ptr=var, part_ptr=part, M=m, rows=rows, chunks=chunks, per=chunks)
    rooms.launch(bn_merge, (-(-c // MERGE[1]), 1), args, tile | dict(FINAL=True))
    return mean, var


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
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and in training the batch's mean and biased variance (two empty vectors otherwise)."""
    from resnet_fast.ops.bn_act.triton_kernels import bn_apply

    if training:
        mean, var = statistics(x)
    x = common.channels_last(x)
    residual = None if residual is None else common.channels_last(residual)
    m, c = _rows(x), x.shape[1]
    y = common.empty_output(x, x.dtype if residual is None else torch.result_type(x, residual))
    block_r, block_c = rooms.rows_tile(c)
    args = dict(
        y_ptr=y,
        x_ptr=x,
        residual_ptr=residual,
        mean_ptr=mean,
        var_ptr=var,
        weight_ptr=weight,
        bias_ptr=bias,
        M=m,
        eps=eps,
    )
    tile = dict(C=c, RELU=relu, STEPS=STEPS, BLOCK_R=block_r, BLOCK_C=block_c)
    rooms.launch(bn_apply, (-(-m // (STEPS * block_r)), -(-c // block_c)), args, tile)
    if training:
        return y, mean, var
    return y, x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)


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
    from resnet_fast.ops.bn_act.triton_kernels import bn_backward_reduce

    dy, x = common.channels_last(dy), common.channels_last(x)
    y = None if y is None or not relu else common.channels_last(y)
    m, c = _rows(x), x.shape[1]
    none = x.new_empty(0)
    dx = common.empty_output(x) if wants[0] and not training else None
    dresidual = common.empty_output(dy) if wants[3] else None
    sums = wants[1] or wants[2] or (wants[0] and training)
    block_r, block_c = rooms.rows_tile(c, widest=REDUCE)
    rows = rooms.chunk_rows(m, c, block_r, block_c, x.device)
    chunks = -(-m // rows)
    part = x.new_empty(2, chunks, c, dtype=torch.float32) if sums else None
    norm = dict(mean_ptr=mean, var_ptr=var, weight_ptr=weight, bias_ptr=bias)
    tile = dict(C=c, RELU=relu, BLOCK_R=block_r, BLOCK_C=block_c)
    args = dict(
        part_ptr=part, dresidual_ptr=dresidual, dx_ptr=dx, dy_ptr=dy, x_ptr=x, y_ptr=y, **norm,
        M=m, rows=rows, eps=eps,
    )  # fmt: skip
    if sums or wants[0] or wants[3]:
        rooms.launch(bn_backward_reduce, (chunks, -(-c // block_c)), args, tile)
    dweight = dbias = none
    if sums:
        dweight, dbias = merge_gradients(part, var, eps)
    if wants[0] and training:
        masked = dresidual is not None  # the reduce pass has written g: read that, and neither dy nor y again
        given = (dresidual, x, None) if masked else (dy, x, y)
        dx = gradient_apply(*given, weight, bias, mean, var, dweight, dbias, 1 / m, eps, relu and not masked)
    return (
        dx if wants[0] else none,
        dweight if wants[1] else none.clone(),
        dbias if wants[2] else none.clone(),
        dresidual if wants[3] else none.clone(),
    )


def merge_gradients(part: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dweight and dbias out of part[2, chunks, C]: sum g, sum g (x - mean) of every chunk of rows."""
    from resnet_fast.ops.bn_act.triton_kernels import bn_backward_merge

    _, chunks, c = part.shape
    tile = dict(C=c, BLOCK_R=MERGE[0], BLOCK_C=MERGE[1])
    if chunks > 16 * MERGE[0]:  # as in `merge`: groups first
        groups = -(-chunks // MERGE[0])
        merged = part.new_empty(2, groups, c)
        args = dict(dweight_ptr=merged[1], dbias_ptr=merged[0], part_ptr=part, var_ptr=var, eps=eps, chunks=chunks)
        constants = tile | dict(FINAL=False)
        rooms.launch(bn_backward_merge, (-(-c // MERGE[1]), groups), args | dict(per=MERGE[0]), constants)
        part, chunks = merged, groups
    dweight, dbias = part.new_empty(c), part.new_empty(c)
    args = dict(dweight_ptr=dweight, dbias_ptr=dbias, part_ptr=part, var_ptr=var, eps=eps, chunks=chunks, per=chunks)
    rooms.launch(bn_backward_merge, (-(-c // MERGE[1]), 1), args, tile | dict(FINAL=True))
    return dweight, dbias


def gradient_apply(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    inverse: float,
    eps: float,
    relu: bool,
) -> Tensor:
    """The input's gradient where dweight and dbias times `inverse` are the means over the batch; all channels_last."""
    from resnet_fast.ops.bn_act.triton_kernels import bn_backward_apply

    m, c = _rows(x), x.shape[1]
    out = common.empty_output(x)
    args = dict(
        dx_ptr=out, dy_ptr=dy, x_ptr=x, y_ptr=y, mean_ptr=mean, var_ptr=var, weight_ptr=weight, bias_ptr=bias,
        dweight_ptr=dweight, dbias_ptr=dbias, M=m, inverse=inverse, eps=eps,
    )  # fmt: skip
    block_r, block_c = rooms.rows_tile(c)
    tile = dict(C=c, RELU=relu, STEPS=STEPS, BLOCK_R=block_r, BLOCK_C=block_c)
    rooms.launch(bn_backward_apply, (-(-m // (STEPS * block_r)), -(-c // block_c)), args, tile)
    return out


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
    dy, x = common.channels_last(dy), common.channels_last(x)
    y = None if y is None or not relu else common.channels_last(y)
    dweight, dbias = ((t / count).float() for t in (dweight, dbias))  # on the device: nothing waits for `count`
    return gradient_apply(dy, x, y, weight, bias, mean, var, dweight, dbias, 1.0, eps, relu)
