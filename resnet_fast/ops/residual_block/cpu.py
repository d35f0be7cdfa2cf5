"""residual_block by the C++ kernels: every convolution, norm and temporary of a block in one call each way."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fast import _native, backends
from resnet_fast.ops import common, conv_cpu
from resnet_fast.ops.residual_block import eager, parts


class Layout(NamedTuple):
    """What follows from the shapes of a block's tensors."""

    settings: list[tuple[tuple[int, ...], tuple[int, ...], float]]  #: a link's sizes, filter strides and eps
    shapes: list[tuple[int, int, int, int]]  #: of the convolutions' outputs
    at: list[int]  #: where a link's mean lies in the statistics; its variance is behind it
    size: int  #: of the statistics
    why_not: str | None  #: the gradients cannot be computed here


@lru_cache(maxsize=4096)
def _layout(x: torch.Size, dtype: torch.dtype, filters: tuple, projects: bool, eps: tuple, windows: tuple) -> Layout:
    settings, shapes, at, size = [], [], [], 0
    n, c, h, w = x
    for i, ((k, _, r, s), strides) in enumerate(filters):
        stride, padding, dilation, groups = (windows[7 * i + j : 7 * i + j + 2] for j in (0, 2, 4, 6))
        if projects and i == len(filters) - 1:
            _, c, h, w = x
        p, q = (common.conv_output_size(*given) for given in zip((h, w), (r, s), stride, padding, dilation))
        settings.append(((n, h, w, c, k, r, s, p, q, *stride, *padding, *dilation, groups[0]), strides, eps[i]))
        shapes.append((n, k, p, q))
        at.append(size)
        size += 2 * k
        c, h, w = k, p, q
    reason = _native.module().residual_block_why_not(_native.DTYPES[dtype], settings, projects)
    return Layout(settings, shapes, at, size, reason)


def _of(x: Tensor, tensors: tuple[Tensor | None, ...], eps: list[float], windows: list[int]) -> Layout:
    filters = tuple((w.shape, w.stride()) for w in tensors[::3] if w is not None)
    return _layout(x.shape, x.dtype, filters, tensors[-3] is not None, tuple(eps), tuple(windows))


def why_not(door: str, *args: object) -> str | None:
    """Dense CPU tensors of one dtype, float32 or bfloat16; filters and vectors float32, as float32 models and autocast have."""
    count = 3 * (eager.LINKS + 1)
    if door == "fwd":
        images, tensors, rest = args[:1], args[1 : 1 + count], args[1 + count : 3 + count]
    else:
        start = 4 + eager.LINKS + 1
        images, tensors, rest = args[:3], args[start : start + count], args[start + count : start + count + 2]
    reason = conv_cpu.why_not(images[0], tensors[0], *images[1:])
    if reason is not None:
        return reason
    for t in tensors:
        if t is None:
            continue
        if t.dtype != torch.float32:
            return f"the cpu room wants filters and vectors of float32, got {t.dtype}"
        if not t.is_contiguous() and not (t.dim() == 4 and t.is_contiguous(memory_format=common.CHANNELS_LAST)):
            return f"the cpu room wants dense filters and vectors, got one of strides {t.stride()}"
    x = images[0] if door == "fwd" else images[1]
    layout = _of(x, tensors, *rest)
    if any(0 in shape for shape in layout.shapes):
        return "the cpu room leaves empty tensors to eager"
    return None if door == "fwd" else layout.why_not


def whole_unmeasured(door: str) -> bool:
    """These are the parts' own kernels, with less between them."""
    return True


def _addresses(
    layout: Layout, tensors: list[tuple[Tensor | None, ...]], z: list[Tensor | None], statistics: Tensor
) -> list:
    base, width = statistics.data_ptr(), statistics.element_size()
    return [
        [*map(common.address, given), common.address(out), base + width * at, base + width * (at + shape[1])]
        for given, out, shape, at in zip(tensors, z, layout.shapes, layout.at)
    ]


def fwd(
    x: Tensor,
    w0: Tensor,
    gamma0: Tensor | None,
    beta0: Tensor | None,
    w1: Tensor | None,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    w2: Tensor | None,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    wp: Tensor | None,
    gammap: Tensor | None,
    betap: Tensor | None,
    eps: list[float],
    windows: list[int],
    recompute: list[bool],
) -> tuple[Tensor, ...]:
    """y, the statistics (mean and biased variance of every link, the projection last), and the convolutions' outputs.

    Outputs that backward is to `recompute` are empty.
    """
    tensors = (w0, gamma0, beta0, w1, gamma1, beta1, w2, gamma2, beta2, wp, gammap, betap)
    layout, projects = _of(x, tensors, eps, windows), wp is not None
    links = [tensors[i : i + 3] for i in range(0, len(tensors), 3) if tensors[i] is not None]
    main = len(links) - projects
    x = common.channels_last(x)
    z = [None if again else common.cpu_output(shape, x.dtype) for shape, again in zip(layout.shapes, recompute)]
    y, statistics = common.cpu_output(layout.shapes[main - 1], x.dtype), torch.empty(layout.size)
    _native.module().residual_block_forward(
        _native.DTYPES[x.dtype], x.data_ptr(), y.data_ptr(), layout.settings, _addresses(layout, links, z, statistics),
        projects, backends.is_exact(), torch.get_num_threads(),
    )  # fmt: skip
    return y, statistics, *eager.spread(z, main, x)


def bwd(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    statistics: Tensor,
    z0: Tensor,
    z1: Tensor,
    z2: Tensor,
    zp: Tensor,
    w0: Tensor,
    gamma0: Tensor | None,
    beta0: Tensor | None,
    w1: Tensor | None,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    w2: Tensor | None,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    wp: Tensor | None,
    gammap: Tensor | None,
    betap: Tensor | None,
    eps: list[float],
    windows: list[int],
    recompute: list[bool],
    wants: list[bool],
) -> tuple[Tensor, ...]:
    """dx and the gradients of the twelve tensors, as far as wanted (empty where not)."""
    tensors = (w0, gamma0, beta0, w1, gamma1, beta1, w2, gamma2, beta2, wp, gammap, betap)
    layout, outputs = _of(x, tensors, eps, windows), (z0, z1, z2, zp)
    there = [i for i in range(eager.LINKS + 1) if tensors[3 * i] is not None]
    links = [tensors[3 * i : 3 * i + 3] for i in there]
    z = [None if again else outputs[i] for i, again in zip(there, recompute)]
    grads = [None if want else x.new_empty(0) for want in wants]
    for i, t in enumerate(tensors, 1):
        if wants[i]:
            grads[i] = common.cpu_gradient(t) if t.dim() == 4 else torch.empty(t.shape[0])
    dy, given = common.channels_last(dy), common.channels_last(x)
    if wants[0]:
        grads[0] = common.cpu_output(x.shape, x.dtype)
    addresses = _addresses(layout, links, z, statistics)
    for i, at in zip(there, addresses):
        at += [
            g.data_ptr() if want else 0 for g, want in zip(grads[1 + 3 * i : 4 + 3 * i], wants[1 + 3 * i : 4 + 3 * i])
        ]
    fine = _native.module().residual_block_backward(
        _native.DTYPES[x.dtype], given.data_ptr(), y.data_ptr(), layout.settings, addresses, wp is not None,
        backends.is_exact(), torch.get_num_threads(), dy.data_ptr(), grads[0].data_ptr() if wants[0] else 0,
    )  # fmt: skip
    if fine:
        return tuple(grads)
    # Something was not finite in a way that reaches other values than torch's: link by link, whose room sees to that.
    return parts.backward(dy, x, y, statistics, *outputs, *tensors, eps, windows, recompute, wants)
