"""Triton kernels of max_pool2d: the maximum of each window, its place as one byte, and the gradient.

Bytes: forward x read once from memory (neighbouring windows share rows in the cache), y and argmax written once;
backward dy and argmax read once, dx written once, where torch moves 8 bytes of index per output.
The idea: channels are the fast axis of every access; backward gathers (each input asks the windows that cover it), so
every dx is written once, without atomics and in a fixed order of additions.
"""

import triton
import triton.language as tl


@triton.jit
def max_pool_forward(
    y_ptr, argmax_ptr, x_ptr, pixels,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    if C % BLOCK_C == 0:
        mask_c = tl.full([BLOCK_C], True, tl.int1)
    mask_m = offs_m < pixels
    image = offs_m // (P * Q)
    pixel = (offs_m % (P * Q)).to(tl.int32)
    h0 = (pixel // Q) * STRIDE_H - PAD_H
    w0 = (pixel % Q) * STRIDE_W - PAD_W
    origin = (image * H + h0) * W + w0
    best = tl.full([BLOCK_M, BLOCK_C], float("-inf"), tl.float32)
    place = tl.full([BLOCK_M, BLOCK_C], 255, tl.int32)  # 255: no place of the window was inside the image yet
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            h = h0 + r * DIL_H
            w = w0 + s * DIL_W
            inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & mask_m
            mask = inside[:, None] & mask_c[None, :]
            at = (origin + (r * DIL_H * W + s * DIL_W)) * C
            x = tl.load(x_ptr + at[:, None] + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
            # torch's rule: a later NaN replaces, an equal value does not.
            take = mask & ((x > best) | (x != x) | (place == 255))
            best = tl.where(take, x, best)
            place = tl.where(take, r * S + s, place)
    out = offs_m[:, None] * C + offs_c[None, :]
    mask = mask_m[:, None] & mask_c[None, :]
    tl.store(y_ptr + out, best.to(y_ptr.dtype.element_ty), mask=mask)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + out, place.to(tl.uint8), mask=mask)


@triton.jit
def max_pool_backward(
    dx_ptr, dy_ptr, argmax_ptr, pixels,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    if C % BLOCK_C == 0:
        mask_c = tl.full([BLOCK_C], True, tl.int1)
    mask_m = offs_m < pixels
    image = offs_m // (H * W)
    pixel = (offs_m % (H * W)).to(tl.int32)
    h = pixel // W + PAD_H
    w = pixel % W + PAD_W
    dx = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            # The window (p, q) whose place (r, s) is this pixel, if there is one.
            ph = h - r * DIL_H
            qw = w - s * DIL_W
            p = ph // STRIDE_H
            q = qw // STRIDE_W
            inside = (ph >= 0) & (p * STRIDE_H == ph) & (p < P) & (qw >= 0) & (q * STRIDE_W == qw) & (q < Q) & mask_m
            mask = inside[:, None] & mask_c[None, :]
            at = ((image * P + p) * Q + q) * C
            place = tl.load(argmax_ptr + at[:, None] + offs_c[None, :], mask=mask, other=255).to(tl.int32)
            dy = tl.load(dy_ptr + at[:, None] + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
            dx += tl.where(place == r * S + s, dy, 0.0)
    mask = mask_m[:, None] & mask_c[None, :]
    tl.store(dx_ptr + offs_m[:, None] * C + offs_c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
