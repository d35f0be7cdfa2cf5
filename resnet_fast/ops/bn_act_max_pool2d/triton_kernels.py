"""Triton kernels of bn_act_max_pool2d: pool(relu(bn(x))) and its gradient, without the normalised map in memory.

Bytes, T being x: forward T, and T/4 plus one byte an output written (3x3 windows, stride 2); backward in two passes over x,
dy and the places (2 times 1.4 T), dx written: 3.8 T where a pool's backward and bn_act's would move 6.4. About 7 flops an
element and tap.
The idea: a place of 255 says that the window's maximum was not above 0, so backward needs neither the map nor y; each
pixel asks the few windows that cover it, so both passes find the same gradient without storing it or adding atomically.
Tried and lost: asking all R S taps (9 loads of places and of dy for the at most 4 windows of a 3x3, stride 2).
"""

import triton
import triton.language as tl

from resnet_fast.ops.bn_act.triton_kernels import channel_mask, load_vector, normalise, reciprocal_std


@triton.jit
def bn_pool_forward(
    y_ptr, places_ptr, x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, pixels, eps,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel_mask(offs_c, C, BLOCK_C)
    mask_m = offs_m < pixels
    mean = load_vector(mean_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    rstd = reciprocal_std(load_vector(var_ptr, offs_c, mask_c, 1.0, BLOCK_C), eps)
    scale = rstd * load_vector(weight_ptr, offs_c, mask_c, 1.0, BLOCK_C)
    bias = load_vector(bias_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    image = offs_m // (P * Q)
    pixel = (offs_m % (P * Q)).to(tl.int32)
    h0 = (pixel // Q) * STRIDE_H - PAD_H
    w0 = (pixel % Q) * STRIDE_W - PAD_W
    origin = (image * H + h0) * W + w0
    # Every window has a tap inside the image, and no value is below 0 after the ReLU.
    best = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    place = tl.full([BLOCK_M, BLOCK_C], 255, tl.int32)
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            h = h0 + r * DIL_H
            w = w0 + s * DIL_W
            inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & mask_m
            mask = inside[:, None] & mask_c[None, :]
            at = (origin + (r * DIL_H * W + s * DIL_W)) * C
            x = tl.load(x_ptr + at[:, None] + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
            # Rounded as bn_act stores it: ties are then those of the map that is not stored.
            v = normalise(x, mean, scale, bias).to(x_ptr.dtype.element_ty).to(tl.float32)
            take = mask & ((v > best) | (v != v))  # the first largest; of NaNs the last, as in torch
            best = tl.where(take, v, best)
            place = tl.where(take, r * S + s, place)
    out = offs_m[:, None] * C + offs_c[None, :]
    mask = mask_m[:, None] & mask_c[None, :]
    tl.store(y_ptr + out, best.to(y_ptr.dtype.element_ty), mask=mask)
    if places_ptr is not None:
        tl.store(places_ptr + out, place.to(tl.uint8), mask=mask)


@triton.jit
def unpool(
    dy_ptr, places_ptr, row, mask_m, offs_c, mask_c,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient at these rows (pixels of all images) of the map: dy of the windows whose maximum is there."""
    # Without dilation the windows over a pixel are neighbours; with it, every tap is asked for its window.
    COVER_H: tl.constexpr = (R + STRIDE_H - 1) // STRIDE_H if DIL_H == 1 else R
    COVER_W: tl.constexpr = (S + STRIDE_W - 1) // STRIDE_W if DIL_W == 1 else S
    image = row // (H * W)
    pixel = (row % (H * W)).to(tl.int32)
    h = pixel // W + PAD_H
    w = pixel % W + PAD_W
    g = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i in tl.static_range(COVER_H):
        if DIL_H == 1:
            p = h // STRIDE_H - i
            r = h - p * STRIDE_H
            inside_h = (p >= 0) & (p < P) & (r < R)
        else:
            r = tl.full([BLOCK_R], i, tl.int32)
            p = (h - i * DIL_H) // STRIDE_H
            inside_h = (h >= i * DIL_H) & (p * STRIDE_H == h - i * DIL_H) & (p < P)
        for j in tl.static_range(COVER_W):
            if DIL_W == 1:
                q = w // STRIDE_W - j
                s = w - q * STRIDE_W
                inside_w = (q >= 0) & (q < Q) & (s < S)
            else:
                s = tl.full([BLOCK_R], j, tl.int32)
                q = (w - j * DIL_W) // STRIDE_W
                inside_w = (w >= j * DIL_W) & (q * STRIDE_W == w - j * DIL_W) & (q < Q)
            mask = (inside_h & inside_w & mask_m)[:, None] & mask_c[None, :]
            at = ((image * P + p) * Q + q) * C
            place = tl.load(places_ptr + at[:, None] + offs_c[None, :], mask=mask, other=255).to(tl.int32)
            dy = tl.load(dy_ptr + at[:, None] + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
            g += tl.where(place == (r * S + s)[:, None], dy, 0.0)
    return g


@triton.jit
def bn_pool_backward_reduce(
    part_ptr, dx_ptr, dy_ptr, places_ptr, x_ptr, mean_ptr, var_ptr, weight_ptr, M, rows, eps,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """part[0] = sum g, part[1] = sum g (x - mean) per chunk; with fixed statistics dx = g rstd weight (None: not wanted)."""
    chunk = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel_mask(offs_c, C, BLOCK_C)
    mean = load_vector(mean_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    rstd = reciprocal_std(load_vector(var_ptr, offs_c, mask_c, 1.0, BLOCK_C), eps)
    scale = rstd * load_vector(weight_ptr, offs_c, mask_c, 1.0, BLOCK_C)
    n = tl.minimum(M - chunk * rows, rows).to(tl.int32)
    offs_r = tl.arange(0, BLOCK_R)
    offs = offs_r[:, None] * C + offs_c[None, :]
    start = chunk * rows
    s1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for m in range(0, n, BLOCK_R):
        mask_m = m + offs_r < n
        mask = mask_m[:, None] & mask_c[None, :]
        g = unpool(
            dy_ptr, places_ptr, start + m + offs_r, mask_m, offs_c, mask_c, C, H, W, P, Q, R, S, STRIDE_H, STRIDE_W,
            PAD_H, PAD_W, DIL_H, DIL_W, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        at = (start + m) * C
        if dx_ptr is not None:
            tl.store(dx_ptr + at + offs, (g * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)
        if part_ptr is not None:
            x = tl.load(x_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
            s1 += g
            s2 += tl.where(mask, g * (x - mean[None, :]), 0.0)
    if part_ptr is not None:
        chunks = tl.num_programs(0).to(tl.int64)
        out = part_ptr + chunk * C + offs_c
        tl.store(out, tl.sum(s1, 0), mask=mask_c)
        tl.store(out + chunks * C, tl.sum(s2, 0), mask=mask_c)


@triton.jit
def bn_pool_backward_apply(
    dx_ptr, dy_ptr, places_ptr, x_ptr, mean_ptr, var_ptr, weight_ptr, dweight_ptr, dbias_ptr, M, inverse, eps,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = weight rstd (g - (dbias + xhat dweight) / M), inverse being 1 / M."""
    first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel_mask(offs_c, C, BLOCK_C)
    mean = load_vector(mean_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    rstd = reciprocal_std(load_vector(var_ptr, offs_c, mask_c, 1.0, BLOCK_C), eps)
    scale = rstd * load_vector(weight_ptr, offs_c, mask_c, 1.0, BLOCK_C)
    mean_g = load_vector(dbias_ptr, offs_c, mask_c, 0.0, BLOCK_C) * inverse
    slope = load_vector(dweight_ptr, offs_c, mask_c, 0.0, BLOCK_C) * inverse * rstd
    offs_r = tl.arange(0, BLOCK_R)
    for step in tl.static_range(STEPS):
        start = first + step * BLOCK_R
        mask_m = start + offs_r < M
        offs = offs_r[:, None] * C + offs_c[None, :]
        mask = mask_m[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + start * C + offs, mask=mask, other=0.0).to(tl.float32)
        g = unpool(
            dy_ptr, places_ptr, start + offs_r, mask_m, offs_c, mask_c, C, H, W, P, Q, R, S, STRIDE_H, STRIDE_W,
            PAD_H, PAD_W, DIL_H, DIL_W, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        dx = (g - mean_g[None, :] - (x - mean[None, :]) * slope[None, :]) * scale[None, :]
        tl.store(dx_ptr + start * C + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
