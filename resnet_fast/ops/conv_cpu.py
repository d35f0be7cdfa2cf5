"""The convolution kernels of the compiled module, as the cpu rooms of conv2d and conv_bn_act call them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fast import _native, backends
from resnet_fast.ops import common

Sizes = tuple[int, ...]
_local = threading.local()


def sizes(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Sizes:
    """The sizes of csrc/conv.h's ConvShape, in its order."""
    n, k, p, q = common.convolution_shape(x, weight, stride, padding, dilation)
    _, c, h, w = x.shape
    return (n, h, w, c, k, weight.shape[2], weight.shape[3], p, q, *stride, *padding, *dilation, groups)


@functools.lru_cache(4096)
def plan(shape: Sizes, dtype: int, threads: int, exact: bool) -> tuple[list[int], int, int, int]:
    """The kernel's own choice for a shape: its configuration, bytes of packed filters and of scratch memory.

    The last is the scratch of packing the filters a panel at a time, 0 where they are packed whole.
    """
    native = _native.module()
    config = native.conv_heuristic(shape, dtype, threads, exact)
    return (
        config,
        native.conv_packed_bytes(shape, dtype, config[0]),
        native.conv_scratch_bytes(shape, dtype, config, threads),
        native.conv_streamed_scratch_bytes(shape, dtype, config[0], threads),
    )


def why_not(x: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    """Dense CPU tensors of one dtype, float32 or bfloat16; the weight float32 with either (the kernels pack it from that)."""
    if x.numel() == 0 or weight.numel() == 0:
        return "the cpu room leaves empty tensors to eager"
    given = (x, *others) if weight.dtype == torch.float32 and weight.device.type == "cpu" else (x, weight, *others)
    return common.cpu_why_not(*given)


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """act(conv(x, weight) scale + shift + residual), channels_last; the filters are packed at every call."""
    native, dtype, threads = _native.module(), _native.DTYPES[x.dtype], torch.get_num_threads()
    shape = sizes(x, weight, stride, padding, dilation, groups)
    filters = weight.detach().float()

    def pack(algorithm: int, packed: int) -> None:
        if scale is None and native.conv_pack_strided_why_not(shape, dtype, algorithm) is None:
            native.conv_pack_strided(shape, algorithm, packed, filters.data_ptr(), *filters.stride(), threads, dtype)
        else:
            dense = filters.contiguous()
            native.conv_pack(shape, dtype, algorithm, packed, dense.data_ptr(), common.address(scale), threads)

    source = None if scale is not None else (filters.data_ptr(), *filters.stride())
    return _convolve(x, shape, pack, source, shift, residual, relu)


def _workspace(size: int) -> tuple[int, Tensor]:
    """The address of working memory, 64-byte aligned, and the tensor that owns it.

    Packed filters take up to tens of megabytes; fresh pages for them cost more than the packing (7x7x512, batch 16:
    23 of 33 ms). Large ones are therefore buffers (csrc/buffers.h), small ones this thread's own, grown as needed and kept.
    """
    if size >= common.POOLED:
        memory = common.cpu_output((1, -(-size // 4) + 16, 1, 1), torch.float32)
    else:
        memory = getattr(_local, "memory", None)
        if memory is None or memory.numel() < size + 64:
            _local.memory = memory = torch.empty(size + 64, dtype=torch.uint8)
    return -(-memory.data_ptr() // 64) * 64, memory


def _convolve(
    x: Tensor,
    shape: Sizes,
    pack: Callable[[int, int], None],
    source: tuple[int, ...] | None,
    shift: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """One convolution; `pack(algorithm, address)` writes its filters as the algorithm wants them.

    source: the filters' address and four strides, where the algorithm may also read them itself.
    """
    native, dtype, threads = _native.module(), _native.DTYPES[x.dtype], torch.get_num_threads()
    config, packed_bytes, scratch_bytes, streamed_bytes = plan(shape, dtype, threads, backends.is_exact())
    x = common.channels_last(x)
    residual = None if residual is None else common.channels_last(residual)
    y = common.cpu_output((shape[0], shape[4], *shape[7:9]), x.dtype)
    if source and streamed_bytes:
        epilogue = (common.address(shift), common.address(residual), relu)
        scratch, _owner = _workspace(streamed_bytes)
        place = (y.data_ptr(), x.data_ptr(), *source, *epilogue, scratch, threads)
        native.conv_run_streamed(shape, dtype, config[0], *place)
        return y
    packed, _owner = _workspace(packed_bytes + scratch_bytes + 64)
    scratch = -(-(packed + packed_bytes) // 64) * 64
    pack(config[0], packed)
    epilogue = (0, common.address(shift), common.address(residual), relu)
    native.conv_run(shape, dtype, config, y.data_ptr(), x.data_ptr(), packed, *epilogue, scratch, threads)
    return y


def backward_why_not(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wants: list[bool],
) -> str | None:
    """As `why_not`, and what the gradient kernels themselves refuse."""
    reason = why_not(dy, weight, x)
    if reason is not None:
        return reason
    shape, dtype = sizes(x, weight, stride, padding, dilation, groups), _native.DTYPES[x.dtype]
    if wants[0] and not _is_convolution(weight, stride, padding, dilation):
        reason = _native.module().conv_dgrad_why_not(shape, dtype)
    if reason is None and wants[1]:
        reason = _native.module().conv_wgrad_why_not(shape, dtype)  # what Winograd takes, the other one takes too
    return reason


def _is_convolution(weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> bool:
    """Whether the data gradient is itself a convolution of dy: stride 1, and padding that fits."""
    return stride[0] == stride[1] == 1 and all(padding[i] <= dilation[i] * (weight.shape[2 + i] - 1) for i in (0, 1))


def data_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """dx. At stride 1 a convolution of dy by the filters with K and C exchanged and their taps reversed.

    At stride 2 by Winograd's algorithm where that can and `exact` does not forbid it.
    """
    if _is_convolution(weight, stride, padding, dilation):
        return _turned_convolution(dy, x, weight, padding, dilation, groups)
    native, threads = _native.module(), torch.get_num_threads()
    shape, dy = sizes(x, weight, stride, padding, dilation, groups), common.channels_last(dy)
    dx, filters = common.cpu_output(x.shape, x.dtype), weight.detach().float()
    place = (dx.data_ptr(), dy.data_ptr(), filters.data_ptr(), *filters.stride(), threads)
    dtype = _native.DTYPES[x.dtype]
    winograd = not backends.is_exact() and native.conv_dgrad_winograd_why_not(shape, dtype) is None
    (native.conv_dgrad_winograd if winograd else native.conv_dgrad)(shape, dtype, *place)
    return dx


def _turned_convolution(
    dy: Tensor, x: Tensor, weight: Tensor, padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    k, c, r, s = weight.shape
    around = [dilation[i] * (weight.shape[2 + i] - 1) - padding[i] for i in (0, 1)]
    filters, dtype = weight.detach().float(), _native.DTYPES[dy.dtype]
    n, _, h, w = x.shape
    shape = (n, *dy.shape[2:], k, groups * c, r, s, h, w, 1, 1, *around, *dilation, groups)
    native, threads = _native.module(), torch.get_num_threads()
    stride_k, stride_c, stride_r, stride_s = filters.stride()
    last_tap = filters.data_ptr() + 4 * ((r - 1) * stride_r + (s - 1) * stride_s)
    turned = (last_tap, stride_c, stride_k, -stride_r, -stride_s)

    def pack(algorithm: int, packed: int) -> None:
        if native.conv_pack_strided_why_not(shape, dtype, algorithm) is None:
            native.conv_pack_strided(shape, algorithm, packed, *turned, threads, dtype)
        else:
            grouped = filters.reshape(groups, k // groups, c, r, s).transpose(1, 2).flip(3, 4)
            dense = grouped.reshape(groups * c, k // groups, r, s).contiguous()
            native.conv_pack(shape, dtype, algorithm, packed, dense.data_ptr(), 0, threads)

    return _convolve(dy, shape, pack, turned, None, None, False)


def weight_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """dw, with the weight's strides: by Winograd where that can and `exact` does not forbid it."""
    native, threads = _native.module(), torch.get_num_threads()
    shape = sizes(x, weight, stride, padding, dilation, groups)
    dy, x = common.channels_last(dy), common.channels_last(x)
    dw = common.cpu_gradient(weight)
    place = (dw.data_ptr(), *dw.stride(), dy.data_ptr(), x.data_ptr(), threads)
    dtype = _native.DTYPES[x.dtype]
    winograd = not backends.is_exact() and native.conv_wgrad_winograd_why_not(shape, dtype) is None
    (native.conv_wgrad_winograd if winograd else native.conv_wgrad)(shape, dtype, *place)
    return dw.to(weight.dtype)
