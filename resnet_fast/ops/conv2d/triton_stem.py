"""Triton kernels that give an image of 3 channels a fourth, so that convolutions on it read whole vectors.

Bytes: the image read once, 4/3 of it written. Two pixels of four 16-bit channels are 16 bytes, the widest access: a 7x7
filter of stride 2 then is 7 rows of 4 "pixels" of 8 channels. The convolution's loop has asynchronous 16-byte copies for
32 scalar loads before, half the registers, and as many multiplications (7 x 32 for 147, as 7 x 21 padded to 7 x 32).
Any strides are read, so an image in NCHW needs no other pass to become channels_last.
"""

import triton
import triton.language as tl


@triton.jit
def pad_image(out_ptr, x_ptr, n, C: tl.constexpr, STRIDE_N, STRIDE_C, STRIDE_P, PIXELS, BLOCK: tl.constexpr):
    """out[pixel, 4] = x's channels and zeros; x's pixels of an image are STRIDE_P apart."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, 4)
    mask = pixel < n
    at = pixel // PIXELS * STRIDE_N + pixel % PIXELS * STRIDE_P
    x = tl.load(x_ptr + at[:, None] + (c * STRIDE_C)[None, :], mask=mask[:, None] & (c < C)[None, :], other=0.0)
    tl.store(out_ptr + pixel[:, None] * 4 + c[None, :], x, mask=mask[:, None])


@triton.jit
def pad_filters(
    out_ptr, w_ptr, n, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, LEAD: tl.constexpr, WIDTH: tl.constexpr,
    STRIDE_K, STRIDE_C, STRIDE_R, STRIDE_S, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[k, r, WIDTH, 4] = the filters, LEAD columns of zeros before them."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = i % 4
    s = i // 4 % WIDTH - LEAD
    r = i // (4 * WIDTH) % R
    k = i // (4 * WIDTH * R)
    mask = (i < n) & (c < C) & (s >= 0) & (s < S)
    at = k * STRIDE_K + c * STRIDE_C + r * STRIDE_R + s * STRIDE_S
    tl.store(out_ptr + i, tl.load(w_ptr + at, mask=mask, other=0.0), mask=i < n)
