"""Triton kernel of the stem in inference: max_pool2d(relu(bn(conv(x))), 3, 2, 1) with nothing between in memory.

Bytes, 7x7/2 at 224 in 16 bit: an image of 0.30 MB read, 0.40 MB written; convolution and pool apart move 3.2 MB more, the map
written and read. Flops: the convolution's, times 256 / 147 (blocks of k), times (strip + 1) / strip (rows computed twice).
The idea: a row of the GEMM is a pooled column. Its two convolution columns 2q and 2q + 1 stand side by side as 2 K columns
over ONE window of the image (S + stride pixels: 30 of 32 values for RGB), so each value is loaded once for both; the third,
2q - 1, is the left neighbour's odd one and comes by a gather inside the tile. A program walks down a strip of pooled rows
and carries the last convolution row in registers. Maxima are taken of float32 sums before shift, ReLU and rounding, all of
them monotone, so the pool sees what the parts would store. A row with a NaN or an infinity is multiplied again, each
column over its own filter's window alone.
Tried and lost by count: 2q - 1 as a third group of columns (1.5 times the products, and 36 values do not fit 32).
"""

import triton
import triton.language as tl

from resnet_fast.ops.conv2d.triton_kernels import dot


@triton.jit
def window_filters(
    out_ptr, w_ptr, n, K: tl.constexpr, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, LEAD: tl.constexpr,
    STEP: tl.constexpr, STRIDE_K, STRIDE_C, STRIDE_R, STRIDE_S, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[block of filters, parity, BLOCK_N, R, BLOCK_K]: rows of filters behind LEAD pixels, the odd ones STEP further."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = i % BLOCK_K
    r = i // BLOCK_K % R
    row = i // (BLOCK_K * R)
    k = row // (2 * BLOCK_N) * BLOCK_N + row % BLOCK_N
    s = column // C - LEAD - row // BLOCK_N % 2 * STEP
    mask = (i < n) & (k < K) & (s >= 0) & (s < S)
    at = k * STRIDE_K + column % C * STRIDE_C + r * STRIDE_R + s * STRIDE_S
    tl.store(out_ptr + i, tl.load(w_ptr + at, mask=mask, other=0.0), mask=i < n)


@triton.jit
def stem_row(
    image_ptr, b_ptrs, at, columns, h0, rows, H: tl.constexpr, WU: tl.constexpr, CU: tl.constexpr, SH: tl.constexpr,
    DIL_H: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Two rows of the convolution, whose first taps are the image's rows h0 and h0 + SH; they share the filters."""
    acc0 = tl.zeros([BLOCK_Q, 2 * BLOCK_N], tl.float32)
    acc1 = tl.zeros([BLOCK_Q, 2 * BLOCK_N], tl.float32)
    for r in range(rows):
        h = h0 + r * DIL_H
        b = tl.load(b_ptrs + r * BLOCK_K)
        upper = tl.load(image_ptr + (h * (WU * CU) + at), mask=columns & (h >= 0) & (h < H), other=0.0)
        acc0 = dot(upper, b, acc0, PRECISION)
        h += SH
        lower = tl.load(image_ptr + (h * (WU * CU) + at), mask=columns & (h >= 0) & (h < H), other=0.0)
        acc1 = dot(lower, b, acc1, PRECISION)
    return acc0, acc1


@triton.jit
def larger(a, b):
    """Of two values the larger; NaN is kept."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def stem_forward(
    y_ptr, x_ptr, w_ptr, scale_ptr, shift_ptr, strip,
    # the image in units of CU values (a pixel, or two); the map the pool sees, and the pool's output
    H: tl.constexpr, WU: tl.constexpr, CU: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    PP: tl.constexpr, PQ: tl.constexpr, R: tl.constexpr,
    # a pooled column's window: VALUES of them, from unit q STEP - START
    VALUES: tl.constexpr, STEP: tl.constexpr, START: tl.constexpr,
    # of which the even column's filter has SPAN values from FIRST, the odd one's as many SHIFT further
    FIRST: tl.constexpr, SPAN: tl.constexpr, SHIFT: tl.constexpr,
    SH: tl.constexpr, PAD_H: tl.constexpr, DIL_H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: (strip of pooled rows and columns, block of filters, image). Column 0 of a tile is its left neighbour's."""
    NUM_Q: tl.constexpr = (PQ + BLOCK_Q - 2) // (BLOCK_Q - 1)
    first = tl.program_id(0) // NUM_Q * strip
    i = tl.arange(0, BLOCK_Q)
    q = tl.program_id(0) % NUM_Q * (BLOCK_Q - 1) - 1 + i
    pid_n = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    unit = (q * STEP - START)[:, None] + (k // CU)[None, :]
    columns = (unit >= 0) & (unit < WU) & (k < VALUES)[None, :]
    at = (q * STEP - START)[:, None] * CU + k[None, :]
    n2 = tl.arange(0, 2 * BLOCK_N)
    b_ptrs = w_ptr + (pid_n * 2 * BLOCK_N + n2)[None, :] * (R * BLOCK_K) + k[:, None]
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < K
    scale = tl.load(scale_ptr + pid_n * BLOCK_N + n2 % BLOCK_N, mask=pid_n * BLOCK_N + n2 % BLOCK_N < K, other=0.0)
    shift = tl.load(shift_ptr + n, mask=mask_n, other=0.0)
    map_column = 2 * q[:, None] + (n2 // BLOCK_N)[None, :]
    on_map = (map_column >= 0) & (map_column < Q)
    left = tl.broadcast_to(tl.maximum(i - 1, 0)[:, None], (BLOCK_Q, BLOCK_N))
    stored = ((i > 0) & (q < PQ))[:, None] & mask_n[None, :]
    out = y_ptr + (image * (PP * PQ * K) + (q[:, None] * K + n[None, :]))

    image_ptr = x_ptr + image * (H * WU * CU)
    rows = R + tl.minimum(strip, 0)  # R; ptxas unrolls a known count wholly, and spills
    carry = tl.full([BLOCK_Q, 2 * BLOCK_N], float("-inf"), tl.float32)
    for p in range(first - 1, tl.minimum(first + strip, PP)):  # from one row above, for its last convolution row
        h0 = 2 * p * SH - PAD_H
        acc0, acc1 = stem_row(
            image_ptr, b_ptrs, at, columns, h0, rows, H, WU, CU, SH, DIL_H, PRECISION, BLOCK_Q, BLOCK_N, BLOCK_K
        )  # fmt: skip
        if tl.max(tl.max(((acc0 != acc0) | (acc1 != acc1)).to(tl.int32), 1), 0) > 0:
            # NaN or an infinity in the image: times the zeros beside a filter it is NaN in a column that does not see it.
            for parity in range(2):
                start = FIRST + parity * SHIFT
                own0, own1 = stem_row(
                    image_ptr, b_ptrs, at, columns & ((k >= start) & (k < start + SPAN))[None, :], h0,
                    rows, H, WU, CU, SH, DIL_H, PRECISION, BLOCK_Q, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                mine = (n2 // BLOCK_N == parity)[None, :]
                acc0 = tl.where(mine, own0, acc0)
                acc1 = tl.where(mine, own1, acc1)
        acc0 = tl.where(on_map & (p >= 0) & (2 * p < P), acc0 * scale[None, :], float("-inf"))
        acc1 = tl.where(on_map & (p >= 0) & (2 * p + 1 < P), acc1 * scale[None, :], float("-inf"))
        best = larger(larger(acc0, acc1), carry)
        even, odd = tl.split(tl.permute(tl.reshape(best, (BLOCK_Q, 2, BLOCK_N)), (0, 2, 1)))
        y = larger(larger(even, odd), tl.gather(odd, left, 0)) + shift[None, :]
        y = tl.where(y <= 0, 0.0, y)  # keeps NaN
        tl.store(out + p * (PQ * K), y.to(y_ptr.dtype.element_ty), mask=stored & (p >= first))
        carry = acc1
