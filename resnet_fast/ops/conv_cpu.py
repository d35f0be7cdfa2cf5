"""The convolution kernels of the compiled module, as the cpu rooms of conv2d and conv_bn_act call them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resnet_fast import _native, backends
from resnet_fast.ops import common

Sizes = tuple[int, ...]


def sizes(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Sizes:
    """The sizes of csrc/conv.h's ConvShape, in its order."""
    n, k, p, q = common.convolution_shape(x, weight, stride, padding, dilation)
    _, c, h, w = x.shape
    return (n, h, w, c, k, weight.shape[2], weight.shape[3], p, q, *stride, *padding, *dilation, groups)


@functools.lru_cache(4096)
def plan(shape: Sizes, dtype: int, threads: int, exact: bool) -> tuple[list[int], int, int]:
    """The kernel's own choice for a shape: its configuration, bytes of packed filters, bytes of scratch memory."""
    native = _native.module()
    config = native.conv_heuristic(shape, dtype, threads, exact)
    return (
        config,
        native.conv_packed_bytes(shape, dtype, config[0]),
        native.conv_scratch_bytes(shape, dtype, config, threads),
    )


def why_not(x: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    """Dense CPU tensors of one dtype, float32 or bfloat16."""
    if x.numel() == 0 or weight.numel() == 0:
        return "the cpu room leaves empty tensors to eager"
    return common.cpu_why_not(x, weight, *others)


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
    native, threads = _native.module(), torch.get_num_threads()
    dtype = _native.DTYPES[x.dtype]
    shape = sizes(x, weight, stride, padding, dilation, groups)
    config, packed_bytes, scratch_bytes = plan(shape, dtype, threads, backends.is_exact())
    x = common.channels_last(x)
    residual = None if residual is None else common.channels_last(residual)
    y = common.empty_convolution(x, weight, stride, padding, dilation)
    memory = torch.empty(packed_bytes + scratch_bytes + 128, dtype=torch.uint8)
    packed = -(-memory.data_ptr() // 64) * 64
    scratch = -(-(packed + packed_bytes) // 64) * 64
    filters = weight.detach().float().contiguous()
    native.conv_pack(shape, dtype, config[0], packed, filters.data_ptr(), common.address(scale), threads)
    native.conv_run(
        shape, dtype, config, y.data_ptr(), x.data_ptr(), packed, 0, common.address(shift), common.address(residual), relu, scratch,
        threads,
    )  # fmt: skip
    return y
