"""Triton kernels of bn_act on the [M, C] view of a channels_last tensor (M = N H W).

Bytes, in tensor passes: statistics 1; apply 2 (3 with a residual); backward reduce 2 reads (3 with a saved y, and 1
write where dresidual is wanted), backward apply 2 reads and 1 write. About 5 flops per element and pass.
The idea: everything is read in [BLOCK_R, BLOCK_C] tiles with whole sectors along C; sums stay in registers per element
of the tile and are folded over rows once per program; partial results are merged in a fixed order, without atomics.
The masked gradient is written by the reduce pass, so the apply pass reads it in place of dy and y: 7 passes, not 8.
Tried and lost: a flat 1-D apply (3 to 9 times the sectors, from re-reading the channel vectors); sums of squares
without a shift (18 % wrong at mean/std 1e3).
"""

import triton
import triton.language as tl


@triton.jit
def channel_mask(offs_c, C: tl.constexpr, BLOCK_C: tl.constexpr):
    # A mask known to be all true disappears from the compiled code.
    if C % BLOCK_C == 0:
        mask = tl.full([BLOCK_C], True, tl.int1)
    else:
        mask = offs_c < C
    return mask


@triton.jit
def load_vector(ptr, offs_c, mask_c, default: tl.constexpr, BLOCK_C: tl.constexpr):
    if ptr is None:
        v = tl.full([BLOCK_C], default, tl.float32)
    else:
        v = tl.load(ptr + offs_c, mask=mask_c, other=default).to(tl.float32)
    return v


@triton.jit
def reciprocal_std(var, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def normalise(x, mean, scale, bias):
    # Forward and the mask recomputed in backward must round alike, hence the explicit fma.
    return tl.fma(x - mean[None, :], scale[None, :], bias[None, :])


@triton.jit
def bn_statistics(x_ptr, part_ptr, M, rows, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """part[0][chunk][c] = mean of the chunk's rows, part[1][chunk][c] = sum of squared deviations from it."""
    chunk = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel_mask(offs_c, C, BLOCK_C)
    n = tl.minimum(M - chunk * rows, rows).to(tl.int32)
    offs_r = tl.arange(0, BLOCK_R)
    offs = offs_r[:, None] * C + offs_c[None, :]
    base = x_ptr + chunk * rows * C

    # The first tile's mean as shift: whatever lies in that tile, little cancels when the shift is taken out again.
    mask = (offs_r < n)[:, None] & mask_c[None, :]
    x = tl.load(base + offs, mask=mask, other=0.0).to(tl.float32)
    shift = tl.sum(x, 0) / tl.minimum(n, BLOCK_R).to(tl.float32)
    d = tl.where(mask, x - shift[None, :], 0.0)
    s1 = d
    s2 = d * d
    for r in range(BLOCK_R, n, BLOCK_R):
        mask = (r + offs_r < n)[:, None] & mask_c[None, :]
        x = tl.load(base + r * C + offs, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, x - shift[None, :], 0.0)
        s1 += d
        s2 += d * d
    count = n.to(tl.float32)
    total = tl.sum(s1, 0)
    squares = tl.sum(s2, 0)
    delta = tl.div_rn(total, count)
    m2 = squares - total * delta
    # Squares that overflow mean an infinite variance, as in torch, not inf - inf.
    m2 = tl.where((squares == float("inf")) & (total == total), float("inf"), tl.where(m2 < 0, 0.0, m2))
    chunks = tl.num_programs(0).to(tl.int64)
    out = part_ptr + chunk * C + offs_c
    tl.store(out, shift + delta, mask=mask_c)
    tl.store(out + chunks * C, m2, mask=mask_c)


@triton.jit
def bn_merge(
    mean_ptr, var_ptr, part_ptr, M, rows, chunks, per,
    C: tl.constexpr, FINAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Chan's merge in two passes over `per` chunks of `rows` rows: the mean, then deviations around it.

    FINAL: mean and biased variance of all; else mean and sum of squared deviations of each group of chunks.
    """
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel_mask(offs_c, C, BLOCK_C)
    group = tl.program_id(1).to(tl.int64)
    begin = group * per
    stop = tl.minimum(begin + per, chunks).to(tl.int32)
    offs_r = tl.arange(0, BLOCK_R)
    # Relative to the first chunk's mean: rounding errors then scale with the spread, not with the mean.
    first = tl.load(part_ptr + begin * C + offs_c, mask=mask_c, other=0.0)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for r in range(begin.to(tl.int32), stop, BLOCK_R):
        i = (r + offs_r).to(tl.int64)
        mask = (i < stop)[:, None] & mask_c[None, :]
        n = tl.minimum(M - i * rows, rows).to(tl.float32)
        mean = tl.load(part_ptr + i[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
        acc += tl.where(mask, (mean - first[None, :]) * n[:, None], 0.0)
    count = (tl.minimum(M - begin * rows, per * tl.full([], 1, tl.int64) * rows)).to(tl.float32)
    mean_all = first + tl.div_rn(tl.sum(acc, 0), count)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for r in range(begin.to(tl.int32), stop, BLOCK_R):
        i = (r + offs_r).to(tl.int64)
        mask = (i < stop)[:, None] & mask_c[None, :]
        n = tl.minimum(M - i * rows, rows).to(tl.float32)
        at = part_ptr + i[:, None] * C + offs_c[None, :]
        d = tl.load(at, mask=mask, other=0.0) - mean_all[None, :]
        m2 = tl.load(at + chunks * tl.full([], C, tl.int64), mask=mask, other=0.0)
        acc += tl.where(mask, m2 + d * d * n[:, None], 0.0)
    m2_all = tl.sum(acc, 0)
    if FINAL:
        m2_all = tl.div_rn(m2_all, count)
    tl.store(mean_ptr + group * C + offs_c, mean_all, mask=mask_c)
    tl.store(var_ptr + group * C + offs_c, m2_all, mask=mask_c)


@triton.jit
def bn_apply(
    y_ptr, x_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, M, eps,
    C: tl.constexpr, RELU: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act((x - mean) rstd weight + bias + residual)."""
    row = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel_mask(offs_c, C, BLOCK_C)
    mean = load_vector(mean_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    rstd = reciprocal_std(load_vector(var_ptr, offs_c, mask_c, 1.0, BLOCK_C), eps)
    scale = rstd * load_vector(weight_ptr, offs_c, mask_c, 1.0, BLOCK_C)
    bias = load_vector(bias_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    for step in tl.static_range(STEPS):
        start = row + step * BLOCK_R
        offs = offs_r[:, None] * C + offs_c[None, :]
        mask = (start + offs_r < M)[:, None] & mask_c[None, :]
        v = normalise(tl.load(x_ptr + start * C + offs, mask=mask).to(tl.float32), mean, scale, bias)
        if residual_ptr is not None:
            v += tl.load(residual_ptr + start * C + offs, mask=mask).to(tl.float32)
        if RELU:
            v = tl.where(v <= 0, 0.0, v)  # keeps NaN
        tl.store(y_ptr + start * C + offs, v.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bn_backward_reduce(
    part_ptr, dresidual_ptr, dx_ptr, dy_ptr, x_ptr, y_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, M, rows, eps,
    C: tl.constexpr, RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g = dy where the ReLU passed. part[0] = sum g, part[1] = sum g (x - mean) per chunk; dresidual = g.

    Whatever pointer is None is not wanted. dx is written here only with fixed statistics: dx = g rstd weight.
    """
    chunk = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel_mask(offs_c, C, BLOCK_C)
    NEED_X: tl.constexpr = part_ptr is not None or (RELU and y_ptr is None)
    mean = load_vector(mean_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    rstd = reciprocal_std(load_vector(var_ptr, offs_c, mask_c, 1.0, BLOCK_C), eps)
    scale = rstd * load_vector(weight_ptr, offs_c, mask_c, 1.0, BLOCK_C)
    bias = load_vector(bias_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    n = tl.minimum(M - chunk * rows, rows).to(tl.int32)
    offs_r = tl.arange(0, BLOCK_R)
    offs = offs_r[:, None] * C + offs_c[None, :]
    start = chunk * rows * C
    s1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for r in range(0, n, BLOCK_R):
        mask = (r + offs_r < n)[:, None] & mask_c[None, :]
        at = start + r * C
        g = tl.load(dy_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
        if NEED_X:
            x = tl.load(x_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            if y_ptr is not None:
                y = tl.load(y_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
            else:
                y = normalise(x, mean, scale, bias)
            g = tl.where(y <= 0, 0.0, g)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at + offs, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dx_ptr is not None:
            tl.store(dx_ptr + at + offs, (g * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)
        if part_ptr is not None:
            s1 += g
            s2 += tl.where(mask, g * (x - mean[None, :]), 0.0)
    if part_ptr is not None:
        chunks = tl.num_programs(0).to(tl.int64)
        out = part_ptr + chunk * C + offs_c
        tl.store(out, tl.sum(s1, 0), mask=mask_c)
        tl.store(out + chunks * C, tl.sum(s2, 0), mask=mask_c)


@triton.jit
def bn_backward_merge(
    dweight_ptr, dbias_ptr, part_ptr, var_ptr, eps, chunks, per,
    C: tl.constexpr, FINAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dbias = sum g, dweight = rstd sum g (x - mean), `per` chunks added in a fixed order.

    FINAL: of all; else the two sums alone of each group of chunks.
    """
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel_mask(offs_c, C, BLOCK_C)
    group = tl.program_id(1)
    begin = group * per
    stop = tl.minimum(begin + per, chunks)
    offs_r = tl.arange(0, BLOCK_R)
    s1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for r in range(begin, stop, BLOCK_R):
        i = (r + offs_r).to(tl.int64)
        mask = (i < stop)[:, None] & mask_c[None, :]
        at = part_ptr + i[:, None] * C + offs_c[None, :]
        s1 += tl.load(at, mask=mask, other=0.0)
        s2 += tl.load(at + chunks * tl.full([], C, tl.int64), mask=mask, other=0.0)
    dweight = tl.sum(s2, 0)
    if FINAL:
        dweight *= reciprocal_std(load_vector(var_ptr, offs_c, mask_c, 1.0, BLOCK_C), eps)
    out = group.to(tl.int64) * C + offs_c
    tl.store(dbias_ptr + out, tl.sum(s1, 0), mask=mask_c)
    tl.store(dweight_ptr + out, dweight, mask=mask_c)


@triton.jit
def bn_backward_apply(
    dx_ptr, dy_ptr, x_ptr, y_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, dweight_ptr, dbias_ptr, M, inverse, eps,
    C: tl.constexpr, RELU: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = weight rstd (g - (dbias + xhat dweight) / M); dy may be the masked gradient already (RELU False).

    inverse is 1 / M: a division per channel in every program costs registers and a subroutine's stack.
    """
    row = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel_mask(offs_c, C, BLOCK_C)
    mean = load_vector(mean_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    rstd = reciprocal_std(load_vector(var_ptr, offs_c, mask_c, 1.0, BLOCK_C), eps)
    scale = rstd * load_vector(weight_ptr, offs_c, mask_c, 1.0, BLOCK_C)
    bias = load_vector(bias_ptr, offs_c, mask_c, 0.0, BLOCK_C)
    mean_g = load_vector(dbias_ptr, offs_c, mask_c, 0.0, BLOCK_C) * inverse
    slope = load_vector(dweight_ptr, offs_c, mask_c, 0.0, BLOCK_C) * inverse * rstd
    offs_r = tl.arange(0, BLOCK_R)
    for step in tl.static_range(STEPS):
        start = row + step * BLOCK_R
        offs = offs_r[:, None] * C + offs_c[None, :]
        mask = (start + offs_r < M)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + start * C + offs, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + start * C + offs, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            if y_ptr is not None:
                y = tl.load(y_ptr + start * C + offs, mask=mask, other=0.0).to(tl.float32)
            else:
                y = normalise(x, mean, scale, bias)
            g = tl.where(y <= 0, 0.0, g)
        dx = (g - mean_g[None, :] - (x - mean[None, :]) * slope[None, :]) * scale[None, :]
        tl.store(dx_ptr + start * C + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
