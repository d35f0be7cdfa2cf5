"""Checks and small words the operators' contract pages share."""

from __future__ import annotations

import math

import torch
import torch.utils.dlpack
from torch import Tensor

from resnet_fast import _native

CHANNELS_LAST = torch.channels_last


def pair(name: str, value: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    """An int or a pair of ints, as torch's convolutions take them."""
    if isinstance(value, (int, torch.SymInt)):
        return value, value
    if not isinstance(value, (tuple, list)) or not all(isinstance(v, (int, torch.SymInt)) for v in value):
        raise TypeError(f"{name}: wanted an int or two ints, got {value!r}")
    if len(value) == 1:
        return value[0], value[0]
    if len(value) != 2:
        raise RuntimeError(f"{name}: wanted an int or two ints, got {value!r}")
    return value[0], value[1]


def check_floating(op: str, name: str, t: Tensor) -> None:
    """Refuse integers and complex numbers, with the type torch's own kernels raise (it is a RuntimeError too)."""
    if not t.is_floating_point():
        raise NotImplementedError(f"{op}: wanted {name} of a floating dtype, got {t.dtype}")


def check_4d(op: str, name: str, x: Tensor) -> None:
    """Refuse what is not a batch of images."""
    if x.dim() != 4:
        raise RuntimeError(f"{op}: wanted {name} of shape (N, C, H, W), got {tuple(x.shape)}")
    check_floating(op, name, x)


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors on one device, as torch's own operators want it."""
    first: tuple[str, torch.device] | None = None
    for name, t in tensors.items():
        if t is None:
            continue
        if first is None:
            first = (name, t.device)
        elif t.device != first[1]:
            raise RuntimeError(
                f"{op}: expected all tensors on one device, got {first[0]} on {first[1]} and {name} on {t.device}"
            )


def check_vector(op: str, name: str, t: Tensor | None, size: int) -> None:
    """A per-channel vector."""
    if t is not None and (t.dim() != 1 or t.shape[0] != size):
        raise RuntimeError(f"{op}: wanted {name} of shape ({size},), one value per channel, got {tuple(t.shape)}")


def channels_last(t: Tensor) -> Tensor:
    """The tensor dense in channels_last; a copy only where it is not."""
    return t.contiguous(memory_format=CHANNELS_LAST)


def dense(t: Tensor) -> Tensor:
    """The tensor in the layout of outputs: channels_last with four dimensions, contiguous otherwise."""
    return channels_last(t) if t.dim() == 4 else t.contiguous()


def empty_output(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of this shape in the layout of outputs."""
    layout = CHANNELS_LAST if t.dim() == 4 else torch.contiguous_format
    return torch.empty(t.shape, dtype=dtype or t.dtype, device=t.device, memory_format=layout)


#: Bytes from which the C++ rooms' outputs live in memory that is kept: malloc reuses smaller ones itself. (With 4 MiB the
#: maps of ResNet-50's third stage at batch 16 were malloc's and needed 28 MB more at a step's peak, beside what is kept.)
POOLED = 1 << 20


def cpu_output(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """An uninitialised channels_last tensor of four dimensions for a C++ room; large ones reuse memory (csrc/buffers.h)."""
    if math.prod(shape) * dtype.itemsize < POOLED:
        return torch.empty(shape, dtype=dtype, memory_format=CHANNELS_LAST)
    return torch.utils.dlpack.from_dlpack(_native.module().buffer(*shape, _native.DTYPES[dtype]))


def cpu_like(t: Tensor) -> Tensor:
    """As `empty_output`, for a C++ room."""
    return cpu_output(t.shape, t.dtype) if t.dim() == 4 else empty_output(t)


def cpu_gradient(weight: Tensor) -> Tensor:
    """An uninitialised float32 tensor with the weight's strides for a C++ room; large ones as in `cpu_output`."""
    if weight.numel() * 4 < POOLED:
        return torch.empty_like(weight, dtype=torch.float32)
    return cpu_output((1, weight.numel(), 1, 1), torch.float32).as_strided(weight.shape, _like_strides(weight))


def _like_strides(t: Tensor) -> tuple[int, ...]:
    """The strides of `torch.empty_like(t)`, which are t's own where it is dense."""
    if t.is_contiguous() or t.is_contiguous(memory_format=CHANNELS_LAST):
        return t.stride()
    return torch.empty_like(t, device="meta").stride()


def as_output(t: Tensor) -> Tensor:
    """What an eager room returns: dense, with the very strides the fakes and the other rooms have."""
    layout = CHANNELS_LAST if t.dim() == 4 else torch.contiguous_format
    fresh = t.contiguous(memory_format=layout)
    if t.dim() == 4 and fresh.stride() != _strides(t.shape):  # sizes of 1 leave strides open
        fresh = fresh.as_strided(t.shape, _strides(t.shape))
    return fresh


def _strides(shape: torch.Size) -> tuple[int, int, int, int]:
    _, c, h, w = shape
    return (h * w * c, 1, w * c, c)


def vector(t: Tensor | None) -> Tensor | None:
    """A per-channel vector as the compiled kernels read it: dense float32."""
    if t is None or (t.dtype == torch.float32 and t.is_contiguous()):
        return t
    return t.detach().float().contiguous()


def address(t: Tensor | None) -> int:
    """Where a tensor's data starts, 0 for None."""
    return 0 if t is None else t.data_ptr()


def cpu_why_not(*tensors: Tensor | None) -> str | None:
    """Why the C++ room cannot take these tensors, None when it can."""
    if _native.why_not():
        return _native.why_not()
    given = [t for t in tensors if t is not None]
    for t in given:
        if t.device.type != "cpu":
            return f"the cpu room wants CPU tensors, got one on {t.device}"
        if t.dtype not in _native.DTYPES:
            return f"the cpu room takes float32 and bfloat16, got {t.dtype}"
        if t.dtype != given[0].dtype:
            return f"the cpu room wants one dtype, got {given[0].dtype} and {t.dtype}"
    return None


def like_input(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient in the layout of the tensor it belongs to."""
    if x.is_contiguous() and not x.is_contiguous(memory_format=CHANNELS_LAST):
        return grad.contiguous()
    return channels_last(grad)


def like_weight(dw: Tensor, weight: Tensor) -> Tensor:
    """A weight gradient with its weight's strides (where those are dense), so that autograd may keep it uncopied."""
    return dw if dw.stride() == _like_strides(weight) else torch.empty_like(weight).copy_(dw)


def conv_output_size(n: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """floor((n + 2 padding - dilation (kernel - 1) - 1) / stride) + 1."""
    return (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def convolution_arguments(op, x, weight, bias, stride, padding, dilation, groups):
    """Check what a convolution is given and bring its arguments to pairs; 'same' may pad x beforehand.

    Returns:
        x, stride, padding, dilation: the last three as lists of two ints.
    """
    check_4d(op, "x", x)
    if weight.dim() != 4:
        raise RuntimeError(f"{op}: wanted weight of shape (K, C / groups, R, S), got {tuple(weight.shape)}")
    check_same_device(op, x=x, weight=weight, bias=bias)
    _check_one_dtype(op, x=x, weight=weight, bias=bias)
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    if min(stride) < 1 or min(dilation) < 1:
        raise RuntimeError(f"{op}: wanted stride and dilation of at least 1, got {stride} and {dilation}")
    if groups < 1 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise RuntimeError(
            f"{op}: weight {tuple(weight.shape)} with {groups} group(s) wants x of {weight.shape[1] * groups} channels and "
            f"filters in whole groups, got x of shape {tuple(x.shape)}"
        )
    check_vector(op, "bias", bias, weight.shape[0])
    if isinstance(padding, str):
        x, padding = _named_padding(op, x, weight, padding, stride, dilation)
    padding = pair("padding", padding)
    if min(padding) < 0:
        raise RuntimeError(f"{op}: wanted padding of at least 0, got {padding}")
    sizes = [conv_output_size(x.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1)]
    if min(sizes) < 1:
        raise RuntimeError(
            f"{op}: the output would be {sizes[0]} x {sizes[1]}: x of {tuple(x.shape[2:])} is smaller than the filter "
            f"{tuple(weight.shape[2:])} (padding {padding}, dilation {dilation})"
        )
    return x, list(stride), list(padding), list(dilation)


def _check_one_dtype(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Under autocast dtypes may differ; the rooms take filters in float32 then, and only then."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return
    for name, t in others.items():
        if t is not None and t.dtype != x.dtype:
            raise RuntimeError(f"{op}: wanted one dtype, got x of {x.dtype} and {name} of {t.dtype}")


def rounded(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A filter or bias that autocast left in float32, in the 16-bit dtype of x; anything else as it is."""
    return t.to(x.dtype) if t is not None and t.dtype == torch.float32 and x.dtype.itemsize == 2 else t


def _named_padding(op, x, weight, padding, stride, dilation):
    if padding == "valid":
        return x, 0
    if padding != "same":
        raise RuntimeError(f'{op}: wanted padding as numbers, "same" or "valid", got {padding!r}')
    if max(stride) != 1:
        raise RuntimeError(f'{op}: padding "same" wants stride 1, got {stride}')
    total = [dilation[i] * (weight.shape[2 + i] - 1) for i in (0, 1)]
    if total[0] % 2 or total[1] % 2:  # even filters: the odd row or column goes below and right
        x = torch.nn.functional.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, (total[0] // 2, total[1] // 2)


def convolution_shape(x, weight, stride, padding, dilation) -> tuple[int, int, int, int]:
    """(N, K, P, Q), the output's shape."""
    p, q = (conv_output_size(x.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    return x.shape[0], weight.shape[0], p, q


def empty_convolution(x, weight, stride, padding, dilation) -> Tensor:
    """The uninitialised output of a convolution."""
    shape = convolution_shape(x, weight, stride, padding, dilation)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)


def scale_shift(
    bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What a norm with known statistics does to a convolution's output: y = z scale + shift, bias included.

    Computed in float64; float32 out, float64 where the statistics are.
    """
    scale = (var.double() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    mean = mean.double()
    shift = -mean * scale if bias is None else (bias - mean) * scale
    if beta is not None:
        shift = shift + beta
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    return scale.to(dtype), shift.to(dtype)


def empty_convolution_gradients(x, weight, wants):
    """The uninitialised dx, dw, dbias; empty where not wanted."""
    return (
        empty_output(x) if wants[0] else x.new_empty(0),
        torch.empty_like(weight) if wants[1] else x.new_empty(0),
        weight.new_empty(weight.shape[0]) if wants[2] else x.new_empty(0),
    )
