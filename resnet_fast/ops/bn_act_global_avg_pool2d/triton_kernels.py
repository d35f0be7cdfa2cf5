"""Triton kernels of bn_act_global_avg_pool2d: mean over pixels of relu(bn(x) + residual), and its gradient.

Bytes, T being x: forward reads x and residual (2 T) where bn_act and a mean move 4 T; backward reads both, writes the masked
gradient, reads it and x again and writes dx (6 T) where a mean's gradient and bn_act's passes with a saved y move 8 T.
The idea: the map's gradient is one number per image and channel where the ReLU passed, so a program takes one image's
channels, holds that number in a register and finds the mask again from x and residual.
Lost by count: a grid over rows of all images, as bn_act has it (the mean would need parts and a second kernel, and the
gradient's number a gather per row).
"""

import triton
import triton.language as tl

from resnet_fast.ops.bn_act.triton_kernels import channel_mask, load_vector, normalise, reciprocal_std


@triton.jit
def bn_mean_forward(
    y_ptr, x_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, share, eps,
    C: tl.constexpr, HW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel_mask(offs_c, C, BLOCK_C)
    mean = load_vector(mean_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    rstd = reciprocal_std(load_vector(var_ptr, offs_c, mask_c, 1.0, BLOCK_C), eps)
    scale = rstd * load_vector(weight_ptr, offs_c, mask_c, 1.0, BLOCK_C)
    bias = load_vector(bias_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    start = image * (HW * C)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for r in range(0, HW, BLOCK_R):
        mask = (r + offs_r < HW)[:, None] & mask_c[None, :]
        offs = (r + offs_r)[:, None] * C + offs_c[None, :]
        v = normalise(tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32), mean, scale, bias)
        if residual_ptr is not None:
            v += tl.load(residual_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        v = tl.where(v <= 0, 0.0, v)  # keeps NaN
        acc += tl.where(mask, v, 0.0)
    y = tl.sum(acc, 0) * share
    tl.store(y_ptr + image * C + offs_c, y.to(y_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def masked_share(
    g, x, residual_ptr, at, mask, mean, scale, bias, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """g at every pixel of the tile whose ReLU passed; at NaN it passes, as in torch."""
    tile = tl.broadcast_to(g[None, :], [BLOCK_R, BLOCK_C])
    v = normalise(x, mean, scale, bias)
    if residual_ptr is not None:
        v += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tile = tl.where(v <= 0, 0.0, tile)
    return tl.where(mask, tile, 0.0)


@triton.jit
def bn_mean_backward_reduce(
    part_ptr, dresidual_ptr, dx_ptr, dy_ptr, x_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, share, eps,
    C: tl.constexpr, HW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """part[0] = sum g, part[1] = sum g (x - mean) per image; dresidual = g. Whatever pointer is None is not wanted.

    dx is written here only with fixed statistics: dx = g rstd weight.
    """
    image = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel_mask(offs_c, C, BLOCK_C)
    mean = load_vector(mean_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    rstd = reciprocal_std(load_vector(var_ptr, offs_c, mask_c, 1.0, BLOCK_C), eps)
    scale = rstd * load_vector(weight_ptr, offs_c, mask_c, 1.0, BLOCK_C)
    bias = load_vector(bias_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    g = load_vector(dy_ptr + image * C, offs_c, mask_c, 0.0, BLOCK_C) * share
    offs_r = tl.arange(0, BLOCK_R)
    start = image * (HW * C)
    s1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for r in range(0, HW, BLOCK_R):
        mask = (r + offs_r < HW)[:, None] & mask_c[None, :]
        at = start + ((r + offs_r)[:, None] * C + offs_c[None, :])
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tile = masked_share(g, x, residual_ptr, at, mask, mean, scale, bias, BLOCK_R, BLOCK_C)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at, tile.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dx_ptr is not None:
            tl.store(dx_ptr + at, (tile * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)
        if part_ptr is not None:
            s1 += tile
            s2 += tl.where(mask, tile * (x - mean[None, :]), 0.0)
    if part_ptr is not None:
        images = tl.num_programs(0).to(tl.int64)
        out = part_ptr + image * C + offs_c
        tl.store(out, tl.sum(s1, 0), mask=mask_c)
        tl.store(out + images * C, tl.sum(s2, 0), mask=mask_c)


@triton.jit
def bn_mean_backward_apply(
    dx_ptr, dy_ptr, x_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, dweight_ptr, dbias_ptr,
    share, inverse, eps,
    C: tl.constexpr, HW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = weight rstd (g - (dbias + xhat dweight) / M), where g was not written because no residual wants it."""
    image = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel_mask(offs_c, C, BLOCK_C)
    mean = load_vector(mean_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    rstd = reciprocal_std(load_vector(var_ptr, offs_c, mask_c, 1.0, BLOCK_C), eps)
    scale = rstd * load_vector(weight_ptr, offs_c, mask_c, 1.0, BLOCK_C)
    bias = load_vector(bias_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    g = load_vector(dy_ptr + image * C, offs_c, mask_c, 0.0, BLOCK_C) * share
    mean_g = load_vector(dbias_ptr, offs_c, mask_c, 0.0, BLOCK_C) * inverse
    slope = load_vector(dweight_ptr, offs_c, mask_c, 0.0, BLOCK_C) * inverse * rstd
    offs_r = tl.arange(0, BLOCK_R)
    start = image * (HW * C)
    for r in range(0, HW, BLOCK_R):
        mask = (r + offs_r < HW)[:, None] & mask_c[None, :]
        at = start + ((r + offs_r)[:, None] * C + offs_c[None, :])
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tile = masked_share(g, x, residual_ptr, at, mask, mean, scale, bias, BLOCK_R, BLOCK_C)
        dx = (tile - mean_g[None, :] - (x - mean[None, :]) * slope[None, :]) * scale[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
