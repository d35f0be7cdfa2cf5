"""Triton kernels of the weight gradient: dw[k, r, s, c] = sum over pixels of dy[pixel, k] x[tap's pixel, c].

A GEMM whose long side, the output pixels, is the reduction: it is split among programs, whose float32 partial results
are added in a fixed order by a second kernel. Bytes: dy and x once from memory, the partials twice; flops as forward.
The idea: dy is loaded already transposed (a transposition after the load would lose the asynchronous copy); pixel
indices are incremented with carries instead of divided; TAPS = 3 taps of a filter row share dy and the indices.
A prologue normalises x (its vectors do not change in the loop), so that backward needs no activation in memory.
Tried and lost: atomics (not deterministic); one tap per program for 3x3 filters (dy read 9 times instead of 3).
"""

import triton
import triton.language as tl

from resnet_fast.ops.conv2d.triton_kernels import dot, load_norm, normalised_tile


@triton.jit
def conv_weight_gradient(
    dw_ptr, dy_ptr, x_ptr, pre_mean_ptr, pre_scale_ptr, pre_shift_ptr, M, rows,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CG: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, KG: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    # dw of (k, tap, c) is at k DW_K + tap DW_T + c DW_C of a split's part
    DW_K: tl.constexpr, DW_T: tl.constexpr, DW_C: tl.constexpr,
    RUN: tl.constexpr, TAPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """RUN: the columns are a filter row's S CG values, side by side in memory (few channels, no dilation along W).

    pre_*: the input is relu(bn(x)), of which only x is in memory; not with RUN.
    """
    WIDTH: tl.constexpr = S * CG if RUN else CG
    NUM_N: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    NUM_S: tl.constexpr = 1 if RUN else S // TAPS
    pid = tl.program_id(0)
    tile_n = (pid % NUM_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = (pid // NUM_N) % NUM_S * TAPS
    r = (pid // (NUM_N * NUM_S)) % R
    tile_k = pid // (NUM_N * NUM_S * R) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    group = tl.program_id(2)

    begin = split * rows
    n = tl.minimum(M - begin, rows)
    offs = tl.arange(0, BLOCK_K)
    mask_k = tile_k < KG
    mask_n = tile_n < WIDTH
    # 64-bit addresses of the first row and the first image, 32-bit offsets from there.
    dy_ptrs = dy_ptr + begin.to(tl.int64) * K + group * KG + (offs[None, :] * K + tile_k[:, None])
    FLAT: tl.constexpr = R * S == 1 and STRIDE_H == 1 and STRIDE_W == 1 and PAD_H == 0 and PAD_W == 0
    first = begin // (P * Q)
    image = (begin + offs) // (P * Q) - first
    pixel = (begin + offs) % (P * Q)
    p = pixel // Q
    q = pixel % Q
    if FLAT:
        x_base = x_ptr + begin.to(tl.int64) * C + group * CG
    else:
        x_base = x_ptr + first.to(tl.int64) * (H * W * C) + group * CG
    if pre_scale_ptr is not None:  # a program's channels stay, and with them their vectors
        mean, scale, shift = load_norm(pre_mean_ptr, pre_scale_ptr, pre_shift_ptr, group * CG + tile_n, mask_n)
    acc0 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc1 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc2 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for m in range(0, n, BLOCK_K):
        inside = m + offs < n
        dy = tl.load(dy_ptrs, mask=inside[None, :] & mask_k[:, None], other=0.0)
        if FLAT:
            x = tl.load(
                x_base + ((m + offs) * C)[:, None] + tile_n[None, :], mask=inside[:, None] & mask_n[None, :], other=0.0
            )
            if pre_scale_ptr is not None:  # beyond the last pixel dy is zero, and x need not be
                x = normalised_tile(x, mean, scale, shift, inside, True)
            acc0 = dot(dy, x, acc0, PRECISION)
        else:
            h = p * STRIDE_H - PAD_H + r * DIL_H
            w = q * STRIDE_W - PAD_W + s * DIL_W
            at = x_base + (((image * H + h) * W + w) * C)[:, None] + tile_n[None, :]
            inside = inside & (h >= 0) & (h < H)
            if RUN:
                column = w[:, None] + (tile_n // CG)[None, :]
                valid = inside[:, None] & (column >= 0) & (column < W) & mask_n[None, :]
            else:
                on = inside & (w >= 0) & (w < W)
                valid = on[:, None] & mask_n[None, :]
            x = tl.load(at, mask=valid, other=0.0)
            if pre_scale_ptr is not None:
                x = normalised_tile(x, mean, scale, shift, on, False)
            acc0 = dot(dy, x, acc0, PRECISION)
            if TAPS == 3:
                w1 = w + DIL_W
                w2 = w + 2 * DIL_W
                on1 = inside & (w1 >= 0) & (w1 < W)
                on2 = inside & (w2 >= 0) & (w2 < W)
                x1 = tl.load(at + DIL_W * C, mask=on1[:, None] & mask_n[None, :], other=0.0)
                if pre_scale_ptr is not None:
                    x1 = normalised_tile(x1, mean, scale, shift, on1, False)
                acc1 = dot(dy, x1, acc1, PRECISION)
                x2 = tl.load(at + 2 * DIL_W * C, mask=on2[:, None] & mask_n[None, :], other=0.0)
                if pre_scale_ptr is not None:
                    x2 = normalised_tile(x2, mean, scale, shift, on2, False)
                acc2 = dot(dy, x2, acc2, PRECISION)
            # The next BLOCK_K pixels, with carries from columns to rows to images.
            q += BLOCK_K % Q
            carry = q >= Q
            q = tl.where(carry, q - Q, q)
            p += (BLOCK_K // Q) % P + carry.to(tl.int32)
            carry = p >= P
            p = tl.where(carry, p - P, p)
            image += BLOCK_K // (P * Q) + carry.to(tl.int32)
        dy_ptrs += BLOCK_K * K

    out = dw_ptr + split.to(tl.int64) * (K * R * S * CG) + ((group * KG + tile_k) * DW_K)[:, None]
    mask = mask_k[:, None] & mask_n[None, :]
    element: tl.constexpr = dw_ptr.dtype.element_ty
    if RUN:
        out += ((r * S + tile_n // CG) * DW_T + tile_n % CG * DW_C)[None, :]
        tl.store(out, acc0.to(element), mask=mask)
    else:
        out += ((r * S + s) * DW_T + tile_n * DW_C)[None, :]
        tl.store(out, acc0.to(element), mask=mask)
        if TAPS == 3:
            tl.store(out + DW_T, acc1.to(element), mask=mask)
            tl.store(out + 2 * DW_T, acc2.to(element), mask=mask)


@triton.jit
def sum_weight_parts(
    dw_ptr, part_ptr, n, splits, CG: tl.constexpr, RS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Adds the splits' parts (k, tap, c) in a fixed order and stores dw as (k, c, tap)."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        acc += tl.load(part_ptr + split * tl.full([], 1, tl.int64) * n + offs, mask=mask, other=0.0)
    k = offs // (RS * CG)
    tap = offs // CG % RS
    c = offs % CG
    tl.store(dw_ptr + (k * CG + c) * RS + tap, acc.to(dw_ptr.dtype.element_ty), mask=mask)
