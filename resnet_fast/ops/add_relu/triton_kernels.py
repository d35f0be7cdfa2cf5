"""Triton kernels of add_relu: y = relu(x + residual) and its gradient, flat over the elements.

Bytes: forward two reads and one write, backward (dy, y -> dx) the same; one flop per element.
The idea: 128-bit accesses, the sum in float32, the block's start in 64 bits and offsets inside it in 32.
Tried and lost: a saved 1-bit mask instead of y. y is written and kept by the next layer anyway, so the mask would add
bytes in forward for what it saves in backward.
"""

import triton
import triton.language as tl


@triton.jit
def add_relu_forward(y_ptr, x_ptr, residual_ptr, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = start + offs < n
    x = tl.load(x_ptr + start + offs, mask=mask).to(tl.float32)
    residual = tl.load(residual_ptr + start + offs, mask=mask).to(tl.float32)
    v = x + residual
    y = tl.where(v <= 0, 0.0, v)  # tl.maximum would turn NaN into 0
    tl.store(y_ptr + start + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_relu_backward(dx_ptr, dy_ptr, y_ptr, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = start + offs < n
    dy = tl.load(dy_ptr + start + offs, mask=mask).to(tl.float32)
    y = tl.load(y_ptr + start + offs, mask=mask).to(tl.float32)
    dx = tl.where(y <= 0, 0.0, dy)  # at NaN the gradient passes, as in torch
    tl.store(dx_ptr + start + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
