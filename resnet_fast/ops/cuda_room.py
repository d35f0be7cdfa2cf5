"""What the cuda rooms share: which tensors they take, where they launch, and the call itself."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from resnet_fast import _native
from resnet_fast.ops import common

#: Packs are this wide; the kernels want every tensor to start at a multiple of it.
ALIGNMENT = 16


def why_not(*tensors: Tensor | None, vectors: tuple[Tensor | None, ...] = ()) -> str | None:
    """Why the CUDA kernels cannot take these activations and per-channel vectors, None when they can."""
    given = [t for t in tensors if t is not None]
    for t in given:
        if t.device.type != "cuda":
            return f"the cuda room wants CUDA tensors, got one on {t.device}"
    reason = _native.cuda_why_not() or _card_why_not(given[0].device.index)
    if reason is not None:
        return reason
    return shape_why_not(given, [v for v in vectors if v is not None])


def shape_why_not(given: list[Tensor], vectors: list[Tensor]) -> str | None:
    """The part of `why_not` that does not depend on the card."""
    for t in given:
        if t.dtype not in _native.CUDA_DTYPES:
            return f"the cuda room takes float32, bfloat16 and float16, got {t.dtype}"
        if t.dtype != given[0].dtype:
            return f"the cuda room wants one dtype, got {given[0].dtype} and {t.dtype}"
        if t.numel() == 0:
            return "the cuda room leaves empty tensors to eager"
    for v in vectors:
        if v.dtype not in _native.CUDA_DTYPES:
            return f"the cuda room takes per-channel vectors of float32, bfloat16 and float16, got {v.dtype}"
    return None


@functools.cache
def _card_why_not(index: int | None) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    return (
        None if major >= 8 else f"the CUDA kernels want compute capability 8.0 or newer, this card has {major}.{minor}"
    )


def target(x: Tensor) -> tuple[int, int]:
    """Device and stream of a launch. (The tests, which execute launches on the CPU, replace this.)"""
    return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream


def call(name: str, x: Tensor, *args: Any) -> Any:
    """Call a function of the CUDA module for x's device, stream and dtype; tensors go as addresses, None as null."""
    given = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in args]
    return getattr(_native.cuda_module(), name)(*target(x), _native.CUDA_DTYPES[x.dtype], *given)


def dense(t: Tensor | None) -> Tensor | None:
    """The tensor in the layout of outputs, aligned for packs; a copy only where it is not."""
    if t is None:
        return None
    t = common.dense(t)
    return t if t.data_ptr() % ALIGNMENT == 0 else t.clone(memory_format=torch.preserve_format)


def vector(t: Tensor | None) -> Tensor | None:
    """A per-channel vector as the kernels read it: contiguous float32."""
    return None if t is None else t.float().contiguous()


def rows(x: Tensor) -> int:
    """N * H * W, the rows of the matrix [rows, channels]."""
    return x.shape[0] * x.shape[2] * x.shape[3]
