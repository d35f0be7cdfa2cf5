"""recomputed_conv_bn_act by Triton: the stem of a network in inference, one kernel from the image to the pooled map."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common
from resnet_fast.ops import triton_common as rooms
from resnet_fast.ops.conv2d import triton as conv
from resnet_fast.ops.conv2d.triton_pairs import RUN_VALUES
from resnet_fast.ops.recomputed_conv_bn_act import eager

POOL = [[3, 3], [2, 2], [1, 1], [1, 1]]
BLOCK_Q, BLOCK_N, WARPS, STAGES = 64, 64, 8, 3


def why_not(door: str, *args: object) -> str | None:
    """A convolution of an RGB image, a norm with known statistics, ReLU and a 3x3 max pool of stride 2."""
    if door != "fwd":
        return "the triton room of recomputed_conv_bn_act computes no gradients"
    x, _, _, _, _, weight, bias, gamma, beta, mean, var, residual, before, *rest = args
    _, _, relu, stride, padding, dilation, groups, pool = rest
    reason = rooms.why_not(x, weight, vectors=(bias, gamma, beta, mean, var))
    reason = reason or conv.refuse(x, weight, stride, padding, dilation, groups)
    if reason is not None:
        return reason
    if before or residual is not None or not relu or mean is None or not pool or eager.windows(pool)[:4] != POOL:
        return "the triton room takes a convolution, a norm with known statistics, ReLU and a 3x3 max pool of stride 2"
    if groups != 1 or dilation[1] != 1 or _window(x, weight, stride, padding)[3] > RUN_VALUES // 2:
        return f"the triton room takes images of few channels, got filters of shape {tuple(weight.shape)}"
    if x.dtype == torch.float32:
        return "the triton room's stem is for bfloat16 and float16: a tile of float32 does not fit the registers"
    return None


def _window(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> tuple[int, int, int, int]:
    """A pooled column's window of the image: pixels a unit, pixels before the filter, units before column 0, values.

    Units of two pixels keep copies of 16-bit values 4 bytes wide; an image of odd width has none.
    """
    pixels = 2 if x.shape[3] % 2 == 0 else 1
    start = -(-padding[1] // pixels)
    lead = start * pixels - padding[1]
    units = -(-(lead + weight.shape[3] + stride[1]) // pixels)
    return pixels, lead, start, units * pixels * x.shape[1]


def _strip(images: int, rows: int, tiles: int, multiprocessors: int) -> int:
    """Pooled rows a program walks down: a longer strip computes fewer rows twice, a shorter one fills the card.

    The least time, in rows: waves of programs (one a multiprocessor), each a strip and the row above it.
    """

    def time(strip: int) -> int:
        return -(-images * tiles * -(-rows // strip) // multiprocessors) * (strip + 1)

    return min(range(1, rows + 1), key=time)


def fwd(
    x: Tensor,
    gamma0: Tensor | None,
    beta0: Tensor | None,
    mean0: Tensor | None,
    var0: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    before: bool,
    eps0: float,
    eps: float,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pool: list[int],
) -> Tensor:
    """max_pool2d(relu(bn(conv(x)))), channels_last."""
    from resnet_fast.ops.recomputed_conv_bn_act.triton_kernels import stem_forward, window_filters

    x = common.channels_last(x)
    (n, c, h, w), (k, _, r, s) = x.shape, weight.shape
    _, _, p, q = common.convolution_shape(x, weight, stride, padding, dilation)
    pp, pq = pool[8:]
    scale, shift = conv.folded_norm(k, bias, gamma, beta, mean, var, eps)
    pixels, lead, start, values = _window(x, weight, stride, padding)
    block_q = max(16, min(rooms.next_power_of_2(pq + 1), BLOCK_Q))
    block_n = max(16, min(rooms.next_power_of_2(k), BLOCK_N))
    blocks, block_k = -(-k // block_n), max(rooms.next_power_of_2(values), 16)
    filters = x.new_empty(blocks, 2, block_n, r, block_k)
    strides = dict(zip(("STRIDE_K", "STRIDE_C", "STRIDE_R", "STRIDE_S"), weight.stride()))
    constants = dict(K=k, C=c, R=r, S=s, LEAD=lead, STEP=stride[1], BLOCK_N=block_n, BLOCK_K=block_k, BLOCK=512)
    args = dict(out_ptr=filters, w_ptr=weight, n=filters.numel()) | strides
    rooms.launch(window_filters, (-(-filters.numel() // 512),), args, constants)
    y = torch.empty((n, k, pp, pq), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    tiles = -(-pq // (block_q - 1))
    strip = _strip(n * blocks, pp, tiles, rooms.multiprocessors(x.device))
    constants = dict(
        H=h, WU=w // pixels, CU=c * pixels, P=p, Q=q, K=k, PP=pp, PQ=pq, R=r, VALUES=values,
        STEP=2 * stride[1] // pixels, START=start, FIRST=lead * c, SPAN=s * c, SHIFT=stride[1] * c,
        SH=stride[0], PAD_H=padding[0], DIL_H=dilation[0], PRECISION=conv.precision(x),
        BLOCK_Q=block_q, BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    args = dict(y_ptr=y, x_ptr=x, w_ptr=filters, scale_ptr=scale, shift_ptr=shift, strip=strip)
    rooms.launch(stem_forward, (-(-pp // strip) * tiles, blocks, n), args, constants, WARPS, STAGES)
    return y
