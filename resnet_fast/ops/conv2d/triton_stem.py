"""Triton kernel that prepares a stem's filters for an image of pixel pairs, so that the image is read as it is.

A 16-bit RGB pixel is 6 bytes: its windows begin at odd elements, and every value is a load of its own. Two pixels are 12
bytes: where stride and width are even, windows of pairs begin at multiples of 4 bytes, and the convolution's loop copies 4
bytes asynchronously. A 7x7 filter of stride 2 then is 7 rows of 4 pairs, 7 x 24 values for 147, in blocks of 32.
Bytes: the filters, a few KB; the image is read once by the convolution.
Tried and lost by count: a padded copy of the image with a fourth channel, for 16-byte copies: a fifth of the copies, and
2.7 images more to move, 42 % of the bytes of image and map.
"""

import triton
import triton.language as tl


@triton.jit
def pair_filters(
    out_ptr, w_ptr, n, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, LEAD: tl.constexpr, WIDTH: tl.constexpr,
    STRIDE_K, STRIDE_C, STRIDE_R, STRIDE_S, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[k, r, WIDTH, C] = the filters, LEAD columns of zeros before them and zeros behind."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = i % C
    s = i // C % WIDTH - LEAD
    r = i // (C * WIDTH) % R
    k = i // (C * WIDTH * R)
    mask = (i < n) & (s >= 0) & (s < S)
    at = k * STRIDE_K + c * STRIDE_C + r * STRIDE_R + s * STRIDE_S
    tl.store(out_ptr + i, tl.load(w_ptr + at, mask=mask, other=0.0), mask=i < n)
