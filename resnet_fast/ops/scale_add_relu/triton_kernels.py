"""Triton kernels of scale_add_relu: y = relu(x * scale[n, c] + residual) and its gradients, on [H W, C] views of images.

Bytes, T being the map: forward 3 T (plain torch 7 T: product, sum and ReLU apart); backward reads dy, x, y and writes dx and
dresidual, 5 T, with the factors' gradient beside it (torch 9 T). Two flops an element forward, four backward.
The idea: a tile never leaves its image, so its factors are one vector, loaded once; the sums over pixels stay in registers
and cross the threads once per program. Parts of an image are added by a second kernel, in a fixed order.
Lost by count: recomputing y's sign from x and residual in backward (the residual would be read, and kept, in y's place).
"""

import triton
import triton.language as tl

from resnet_fast.ops.bn_act.triton_kernels import channel_mask, load_vector


@triton.jit
def scale_add_relu_forward(
    y_ptr, x_ptr, scale_ptr, residual_ptr,
    C: tl.constexpr, HW: tl.constexpr, TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0) // TILES
    offs_r = tl.program_id(0) % TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel_mask(offs_c, C, BLOCK_C)
    mask = (offs_r < HW)[:, None] & mask_c[None, :]
    start = image.to(tl.int64) * (HW * C)
    offs = offs_r[:, None] * C + offs_c[None, :]
    scale = load_vector(scale_ptr + image.to(tl.int64) * C, offs_c, mask_c, 0.0, BLOCK_C)
    x = tl.load(x_ptr + start + offs, mask=mask).to(tl.float32)
    residual = tl.load(residual_ptr + start + offs, mask=mask).to(tl.float32)
    v = tl.fma(x, scale[None, :], residual)
    y = tl.where(v <= 0, 0.0, v)  # keeps NaN
    tl.store(y_ptr + start + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_add_relu_backward(
    dx_ptr, sums_ptr, dresidual_ptr, dy_ptr, x_ptr, scale_ptr, y_ptr,
    C: tl.constexpr, HW: tl.constexpr, STEPS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g = dy where the ReLU passed; sums[image, chunk, c] = sum of g x. Whatever pointer is None is not wanted."""
    image = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel_mask(offs_c, C, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    start = image * (HW * C)
    if dx_ptr is not None:
        scale = load_vector(scale_ptr + image * C, offs_c, mask_c, 0.0, BLOCK_C)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    first = chunk * (STEPS * BLOCK_R)
    for r in range(first, tl.minimum(first + STEPS * BLOCK_R, HW), BLOCK_R):
        mask = (r + offs_r < HW)[:, None] & mask_c[None, :]
        offs = (r + offs_r)[:, None] * C + offs_c[None, :]
        g = tl.load(dy_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        g = tl.where(y <= 0, 0.0, g)
        if sums_ptr is not None:  # before the stores: behind them ptxas spills a pair of sums on sm_100
            acc += g * tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + start + offs, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dx_ptr is not None:
            tl.store(dx_ptr + start + offs, (g * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        out = sums_ptr + (image * CHUNKS + chunk) * C + offs_c
        tl.store(out, tl.sum(acc, 0).to(sums_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def sum_scale_parts(dscale_ptr, sums_ptr, n, C: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of an image's parts, in a fixed order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    at = (i // C).to(tl.int64) * (CHUNKS * C) + i % C
    acc = tl.zeros([BLOCK], tl.float32)
    for chunk in range(CHUNKS):
        acc += tl.load(sums_ptr + at + chunk * C, mask=mask, other=0.0)
    tl.store(dscale_ptr + i, acc.to(dscale_ptr.dtype.element_ty), mask=mask)
