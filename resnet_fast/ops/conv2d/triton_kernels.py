"""Triton kernels of convolution as implicit GEMM on channels_last tensors: forward and data gradient.

One kernel serves both, because both gather: the row (n, i, j) of the output reads the input at (i SH + H0 + u TH,
j SW + W0 + v TW) for every tap (u, v), and sums over the channels there. Bytes: input, weights, residual read once from
memory (taps of a tile hit the cache), output written once; 2 GEMM_M GEMM_N GEMM_K flops.
A prologue (relu(bn(in)) on the loaded tile) saves a network's normalised activations a write and a read; an epilogue of the data
gradient sums what that norm's backward wants.
The idea: ONE loop over taps and channel blocks, so that the asynchronous copies never drain; the validity of each row at
each tap is a bit computed once and shifted along; pointers are incremented; sizes are constants of the compilation.
Tried and lost: a loop over channels inside a loop over taps (no asynchronous copies at C = BLOCK_K, spills on sm_100);
comparing coordinates in the loop (12 more instructions per tile and iteration; kept for filters above 31 taps).
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "interpreted":  # Triton's interpreter multiplies the bit patterns of bfloat16; products are exact
        acc += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def fold_norm(
    scale_ptr, shift_ptr, bias_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, K, BLOCK: tl.constexpr
):  # fmt: skip
    """A norm with known statistics as y = z scale + shift, the convolution's bias included.

    A launch of its own: square root and division in the epilogue cost every thread 40 instructions per column it holds.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < K
    mean = tl.load(mean_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.load(var_ptr + offs, mask=mask, other=1.0).to(tl.float32) + eps))
    if gamma_ptr is not None:
        scale *= tl.load(gamma_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        mean -= tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    shift = -mean * scale
    if beta_ptr is not None:
        shift += tl.load(beta_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(scale_ptr + offs, scale, mask=mask)
    tl.store(shift_ptr + offs, shift, mask=mask)


@triton.jit
def norm_vectors(scale_ptr, shift_ptr, gamma_ptr, beta_ptr, var_ptr, eps, C, BLOCK: tl.constexpr):
    """bn_act's own scale and bias per channel, in float32: what the prologue multiplies and adds, computed once."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < C
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.load(var_ptr + offs, mask=mask, other=1.0).to(tl.float32) + eps))
    if gamma_ptr is not None:
        scale *= tl.load(gamma_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    shift = tl.zeros([BLOCK], tl.float32)
    if beta_ptr is not None:
        shift = tl.load(beta_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(scale_ptr + offs, scale, mask=mask)
    tl.store(shift_ptr + offs, shift, mask=mask)


@triton.jit
def load_norm(mean_ptr, scale_ptr, shift_ptr, offs, mask):
    """A norm's vectors at these channels, as `norm_vectors` made them."""
    mean = tl.load(mean_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + offs, mask=mask, other=0.0)
    shift = tl.load(shift_ptr + offs, mask=mask, other=0.0)
    return mean, scale, shift


@triton.jit
def normalised_tile(a, mean, scale, shift, inside, FLAT: tl.constexpr):
    """relu(bn(a)) rounded as bn_act would have stored it, and zero outside the image, whatever relu(shift) is.

    In float32: packed 16-bit arithmetic has a third of the instructions and up to three times the error (the rounded shift).
    """
    v = tl.fma(a.to(tl.float32) - mean[None, :], scale[None, :], shift[None, :])
    v = tl.where(v <= 0, 0.0, v)  # keeps NaN
    if not FLAT:  # rows beyond the last are stored nowhere and need no zero
        v = tl.where(inside[:, None], v, 0.0)
    return v.to(a.dtype)


@triton.jit
def finish_tile(
    acc, out_ptr, residual_ptr, scale_ptr, shift_ptr, offs, mask, offs_n, mask_n, RELU: tl.constexpr
):  # fmt: skip
    """Scale, shift, residual, ReLU on the float32 sums; then one rounding and the store."""
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.where(acc <= 0, 0.0, acc)  # keeps NaN
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_tile_statistics(
    acc, out_ptr, shift_ptr, part_ptr, offs, mask, offs_n, mask_n, pid_m, M, CO: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Store the tile, and the mean and squared deviations of its rows, of the values as they are stored.

    The load never executes (M is positive). It pins the tile to the layout of the stores, in which sums over rows stay
    in a thread; in the accumulator's layout they cost 14 times the shuffles on sm_100.
    """
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out = acc.to(out_ptr.dtype.element_ty)
    out += tl.load(out_ptr + offs, mask=mask & (M < 0), other=0.0)
    tl.store(out_ptr + offs, out, mask=mask)
    rows = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M) < M)[:, None]
    v = out.to(tl.float32)
    count = tl.minimum(M - pid_m * BLOCK_M, BLOCK_M).to(tl.float32)
    mean = tl.div_rn(tl.sum(tl.where(rows, v, 0.0), 0), count)
    d = tl.where(rows, v - mean[None, :], 0.0)
    tiles = (M + BLOCK_M - 1) // BLOCK_M
    at = part_ptr + pid_m.to(tl.int64) * CO + offs_n
    tl.store(at, mean, mask=mask_n)
    tl.store(at + tiles * tl.full([], CO, tl.int64), tl.sum(d * d, 0), mask=mask_n)


@triton.jit
def finish_tile_norm_backward(
    acc, out_ptr, z_ptr, part_ptr, mean, scale, shift, offs, mask, rows, offs_n, mask_n, chunk, chunks, M,
    CO: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """The gradient of y = relu(bn(z)): store it, and its sums as bn_act's backward reduces them, of the values as stored.

    g = dy where the ReLU passed; part[0] = sum g, part[1] = sum g (z - mean) of the tile's rows (None: not wanted). FIXED: the
    norm's statistics are known, and what is stored is dz = g scale itself. The load that never executes is as in
    `finish_tile_statistics`; without it z goes through shared memory to the accumulator's layout, and both sums back.
    """
    out = acc.to(out_ptr.dtype.element_ty)
    out += tl.load(out_ptr + offs, mask=mask & (M < 0), other=0.0)
    d = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    g = tl.where(tl.fma(d, scale[None, :], shift[None, :]) <= 0, 0.0, out.to(tl.float32))  # keeps NaN
    if FIXED:
        out = (g * scale[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs, out, mask=mask)
    if part_ptr is not None:
        at = part_ptr + chunk.to(tl.int64) * CO + offs_n
        tl.store(at, tl.sum(tl.where(rows, g, 0.0), 0), mask=mask_n)
        tl.store(at + chunks * tl.full([], CO, tl.int64), tl.sum(tl.where(rows, g * d, 0.0), 0), mask=mask_n)


@triton.jit
def gather_gemm(
    out_ptr, in_ptr, w_ptr, residual_ptr, scale_ptr, shift_ptr, part_ptr, z_ptr, pre_mean_ptr, pre_scale_ptr,
    pre_shift_ptr, M,
    # input: height, width, channels (all, of a group); output: height, width, channels (all, of a group)
    HI: tl.constexpr, WI: tl.constexpr, CI: tl.constexpr, CG: tl.constexpr,
    HO: tl.constexpr, WO: tl.constexpr, CO: tl.constexpr, NG: tl.constexpr,
    # rows of the GEMM: (n, i, j), i < I, j < J, which is the output's pixel (i OH + OH0, j OW + OW0)
    I: tl.constexpr, J: tl.constexpr,  # noqa: E741
    OH: tl.constexpr, OW: tl.constexpr, OH0: tl.constexpr, OW0: tl.constexpr,
    # the input's pixel of row (i, j) at tap (u, v): (i SH + H0 + u TH, j SW + W0 + v TW)
    U: tl.constexpr, V: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, H0: tl.constexpr, W0: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr,
    # the weight of (group, n, tap, k): at group WG + n WN + W_START + u WU + v WV + k WK
    WG: tl.constexpr, WN: tl.constexpr, W_START: tl.constexpr, WU: tl.constexpr, WV: tl.constexpr, WK: tl.constexpr,
    RUN: tl.constexpr, RUN_FROM: tl.constexpr, RUN_TO: tl.constexpr,
    RELU: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CLASSES: tl.constexpr,
    FIXED: tl.constexpr = False,
):  # fmt: skip
    """RUN: a filter row's V CG values lie side by side in memory and are one block of k (few channels, TW = 1), of which the
    filter has those from RUN_FROM to RUN_TO.

    pre_*: a norm and ReLU before the convolution. Forward the input is relu(bn(in)), of which only `in` is in memory; not with
    RUN. With z_ptr this is the data gradient, the output is what relu(bn(z)) gets, and `finish_tile_norm_backward` ends it.
    """
    NUM_N: tl.constexpr = (NG + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0) // CLASSES  # of a strided data gradient, each of which calls this on its own
    pid_m = pid // NUM_N  # n is the fast axis: programs that share an input tile run together
    pid_n = pid % NUM_N
    split = tl.program_id(1)
    group = tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M

    # Offsets are 32-bit, relative to the first image (or row) of the tile, whose address is 64-bit.
    FLAT: tl.constexpr = (U * V == 1) and SH == 1 and SW == 1 and H0 == 0 and W0 == 0 and HI == I and WI == J
    if FLAT:
        in_base = in_ptr + (pid_m * BLOCK_M).to(tl.int64) * CI
        offs_in = tl.arange(0, BLOCK_M) * CI
    else:
        first = (pid_m * BLOCK_M) // (I * J)
        image = offs_m // (I * J) - first
        pixel = offs_m % (I * J)
        h0 = (pixel // J) * SH + H0
        w0 = (pixel % J) * SW + W0
        in_base = in_ptr + first.to(tl.int64) * (HI * WI * CI)
        offs_in = ((image * HI + h0) * WI + w0) * CI
    # Columns beyond the group's repeat its first: their products are never stored, and no mask is needed.
    safe_n = tile_n
    if NG % BLOCK_N != 0:
        safe_n = tl.where(tile_n < NG, tile_n, 0)
    a_ptrs = in_base + group * CG + offs_in[:, None] + offs_k[None, :]
    b_ptrs = w_ptr + group.to(tl.int64) * WG + W_START + safe_n[None, :] * WN + offs_k[:, None] * WK
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    if RUN:
        # One iteration per filter row; a column's tap is its index over CG.
        w = w0[:, None] + (offs_k // CG)[None, :]
        columns = (w >= 0) & (w < WI) & (offs_k < V * CG)[None, :] & mask_m[:, None]
        for u in range(U):
            h = h0 + u * TH
            a = tl.load(a_ptrs, mask=columns & ((h >= 0) & (h < HI))[:, None], other=0.0)
            if RUN_FROM > 0 or RUN_TO < V * CG:  # outside the filter its zeros would make NaN of a neighbour's NaN
                a = tl.where(((offs_k >= RUN_FROM) & (offs_k < RUN_TO))[None, :], a, 0.0)
            b = tl.load(b_ptrs, mask=(offs_k < V * CG)[:, None], other=0.0)
            acc = dot(a, b, acc, PRECISION)
            a_ptrs += TH * WI * CI
            b_ptrs += WU
    else:
        CB: tl.constexpr = (CG + BLOCK_K - 1) // BLOCK_K
        TOTAL: tl.constexpr = U * V * CB
        BITS: tl.constexpr = U * V <= 31
        valid = mask_m.to(tl.int32)
        if BITS and not FLAT:
            valid = tl.zeros([BLOCK_M], tl.int32)
            for tap in tl.static_range(U * V):
                h = h0 + (tap // V) * TH
                w = w0 + (tap % V) * TW
                inside = (h >= 0) & (h < HI) & (w >= 0) & (w < WI) & mask_m
                valid = valid | (inside.to(tl.int32) << tap)
        cb = 0
        u = 0
        v = 0
        steps = TOTAL
        if OH * OW > 1:
            steps = TOTAL + tl.minimum(M, 0)  # TOTAL; ptxas unrolls the few steps of a known count wholly, and spills
        if SPLIT > 1:
            PER: tl.constexpr = (TOTAL + SPLIT - 1) // SPLIT
            begin = split * PER
            steps = tl.minimum(TOTAL - begin, PER)
            tap = begin // CB
            cb = begin % CB
            u = tap // V
            v = tap % V
            a_ptrs += (u * TH * WI + v * TW) * CI + cb * BLOCK_K
            b_ptrs += u * WU + v * WV + cb * (BLOCK_K * WK)
            if BITS:
                valid = valid >> tap
        for _ in range(steps):
            if BITS:
                rows = (valid & 1) != 0
            else:
                h = h0 + u * TH
                w = w0 + v * TW
                rows = (h >= 0) & (h < HI) & (w >= 0) & (w < WI) & mask_m
            if CG % BLOCK_K == 0:
                inner = tl.full([BLOCK_K], True, tl.int1)
                a = tl.load(a_ptrs, mask=rows[:, None], other=0.0)
                b = tl.load(b_ptrs)
            else:
                inner = cb * BLOCK_K + offs_k < CG
                a = tl.load(a_ptrs, mask=rows[:, None] & inner[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=inner[:, None], other=0.0)
            if pre_scale_ptr is not None and z_ptr is None:
                at = group * CG + cb * BLOCK_K + offs_k
                mean, scale, shift = load_norm(pre_mean_ptr, pre_scale_ptr, pre_shift_ptr, at, inner)
                a = normalised_tile(a, mean, scale, shift, rows, FLAT)
            acc = dot(a, b, acc, PRECISION)
            if U * V == 1:
                cb += 1
                a_ptrs += BLOCK_K
                b_ptrs += BLOCK_K * WK
            elif CB == 1:
                v += 1
                end = v == V
                v = tl.where(end, 0, v)
                u = tl.where(end, u + 1, u)
                a_ptrs += tl.where(end, (TH * WI - (V - 1) * TW) * CI, TW * CI)
                b_ptrs += tl.where(end, WU - (V - 1) * WV, WV)
                valid = valid >> 1
            else:
                cb += 1
                last = cb == CB
                cb = tl.where(last, 0, cb)
                v = tl.where(last, v + 1, v)
                end = v == V
                v = tl.where(end, 0, v)
                u = tl.where(end, u + 1, u)
                BACK: tl.constexpr = (CB - 1) * BLOCK_K
                tap_step = tl.where(end, (TH * WI - (V - 1) * TW) * CI, TW * CI) - BACK
                a_ptrs += tl.where(last, tap_step, BLOCK_K)
                if WV - BACK * WK == BLOCK_K * WK and WU - (V - 1) * WV == WV:
                    b_ptrs += BLOCK_K * WK
                else:
                    tap_step_w = tl.where(end, WU - (V - 1) * WV, WV) - BACK * WK
                    b_ptrs += tl.where(last, tap_step_w, BLOCK_K * WK)
                valid = tl.where(last, valid >> 1, valid)

    mask = mask_m[:, None]
    if NG % BLOCK_N != 0:
        mask = mask & (tile_n < NG)[None, :]
    offs_n = group * NG + tile_n
    if OH == 1 and OW == 1 and I == HO and J == WO:
        start = (pid_m * BLOCK_M).to(tl.int64) * CO
        offs = start + (tl.arange(0, BLOCK_M)[:, None] * CO + offs_n[None, :])
    else:
        first_out = (pid_m * BLOCK_M) // (I * J)
        pixel_out = offs_m % (I * J)
        row = ((offs_m // (I * J) - first_out) * HO + (pixel_out // J) * OH + OH0) * WO + (pixel_out % J) * OW + OW0
        offs = first_out.to(tl.int64) * (HO * WO * CO) + (row[:, None] * CO + offs_n[None, :])
    if SPLIT > 1:  # partial sums, finished by split_finish
        start = split.to(tl.int64) * M * CO + (pid_m * BLOCK_M).to(tl.int64) * CO
        tl.store(out_ptr + start + (tl.arange(0, BLOCK_M)[:, None] * CO + offs_n[None, :]), acc, mask=mask)
    else:
        mask_n = tile_n < NG
        if NG % BLOCK_N == 0:
            mask_n = tl.full([BLOCK_N], True, tl.int1)
        if z_ptr is not None:
            mean, scale, shift = load_norm(pre_mean_ptr, pre_scale_ptr, pre_shift_ptr, offs_n, mask_n)
            finish_tile_norm_backward(
                acc, out_ptr, z_ptr, part_ptr, mean, scale, shift, offs, mask, mask_m[:, None], offs_n, mask_n,
                pid_m * CLASSES + tl.program_id(0) % CLASSES, tl.num_programs(0) // NUM_N, M, CO, FIXED,
            )  # fmt: skip
        elif part_ptr is not None:
            finish_tile_statistics(
                acc, out_ptr, shift_ptr, part_ptr, offs, mask, offs_n, mask_n, pid_m, M, CO, BLOCK_M
            )  # fmt: skip
        else:
            finish_tile(acc, out_ptr, residual_ptr, scale_ptr, shift_ptr, offs, mask, offs_n, mask_n, RELU)


@triton.jit
def split_finish(
    out_ptr, part_ptr, residual_ptr, scale_ptr, shift_ptr, M,
    CO: tl.constexpr, RELU: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of a split GEMM_K in a fixed order, then the epilogue."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs = row * CO + (tl.arange(0, BLOCK_M)[:, None] * CO + offs_n[None, :])
    mask_n = offs_n < CO
    mask = (row + tl.arange(0, BLOCK_M) < M)[:, None] & mask_n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    size = tl.full([], CO, tl.int64) * M
    for split in tl.static_range(SPLIT):
        acc += tl.load(part_ptr + split * size + offs, mask=mask, other=0.0)
    finish_tile(acc, out_ptr, residual_ptr, scale_ptr, shift_ptr, offs, mask, offs_n, mask_n, RELU)
