"""What a normalising operator must be given, and how running statistics move; shared by bn_act and conv_bn_act."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from resnet_fast import _native, _plain
from resnet_fast.ops import common


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Statistics are float32, float64 for float64 activations."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def activation(act: str | None, op: str) -> None:
    """Only ReLU, or none."""
    if act not in ("relu", None):
        raise ValueError(f'{op}: wanted act "relu" or None, got {act!r}')


def normalised(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    act: str | None,
    eps: float,
    momentum: float,
    op: str,
    group: distributed.ProcessGroup | None = None,
) -> None:
    """Checks of the tensor that is normalised (the convolution's output, where there is one)."""
    common.check_4d(op, "x", x)
    activation(act, op)
    channels = x.shape[1]
    for name, t in (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias)):
        common.check_vector(op, name, t, channels)
    known_statistics(running_mean, running_var, training, op)
    positive_eps(eps, training, op)
    if training and running_mean is not None and not isinstance(momentum, (int, float)):
        raise TypeError(f"{op}: wanted momentum as a number, got {momentum!r} (a module turns None into an average)")
    residual_like(residual, x.shape, op)
    common.check_same_device(
        op, x=x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias, residual=residual
    )
    if training and group is None:  # of a group's batch this process may have one value, or none
        several_values(x.shape)


def known_statistics(running_mean: Tensor | None, running_var: Tensor | None, training: bool, op: str) -> None:
    """Both running statistics or neither, and both when not training."""
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: wanted running_mean and running_var both or neither, got one of them")
    if not training and running_mean is None:
        raise RuntimeError(f"{op}: running_mean and running_var are wanted when not training, got None")


def positive_eps(eps: float, training: bool, op: str) -> None:
    """eps guards the division: above 0 in training, never below it."""
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"{op}: wanted eps {'above' if training else 'of at least'} 0, got {eps}")


def residual_like(residual: Tensor | None, shape: torch.Size | tuple[int, ...], op: str) -> None:
    """A residual of the output's shape: it is added, never broadcast."""
    if residual is not None and residual.shape != shape:
        raise RuntimeError(f"{op}: wanted residual of the output's shape {tuple(shape)}, got {tuple(residual.shape)}")
    if residual is not None:
        common.check_floating(op, "residual", residual)


def several_values(shape: torch.Size | tuple[int, ...]) -> None:
    """A variance needs more than one value per channel; torch's own words."""
    if shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")


@torch.no_grad()
def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    shape: torch.Size | tuple[int, ...],
    count: Tensor | None = None,
) -> None:
    """Move the running statistics by the batch's as torch does: the variance unbiased, nothing on an empty batch.

    Args:
        shape: of the normalised tensor.
        count: the values behind mean and var where several processes share them (else None or empty: this shape's).
    """
    n = shape[0] * shape[2] * shape[3]
    if count is not None and count.numel():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
        return
    if n == 0:
        return
    if running_mean is not None and _native.why_not() is None and _plain_floats(running_mean, running_var, mean, var):
        place = [t.data_ptr() for t in (running_mean, running_var, mean, var)]
        _native.module().bn_update_running(*place, n, shape[1], momentum)
        torch.autograd.graph.increment_version((running_mean, running_var))
        return
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
    if running_var is not None:
        running_var.mul_(1 - momentum).add_(var.to(running_var.dtype), alpha=momentum * (n / (n - 1)))


@torch.no_grad()
def update_running_each(
    norms: Sequence[tuple], statistics: Tensor, shapes: Sequence[torch.Size | tuple[int, ...]]
) -> None:
    """`update_running` of several norms whose means and biased variances lie one after the other in one tensor.

    Args:
        norms: (running_mean, running_var, weight, bias, training, momentum, ...) each.
        shapes: of the normalised tensors.
    """
    counts, channels = [n * h * w for n, _, h, w in shapes], [shape[1] for shape in shapes]
    tracked = [t for norm in norms for t in norm[:2] if t is not None]
    if not tracked or 0 in counts:
        return
    if len(tracked) == 2 * len(norms) and _native.why_not() is None and _plain_floats(*tracked, statistics):
        at, places = statistics.data_ptr(), []
        for (mean, var, *_), k in zip(norms, channels):
            places.append((mean.data_ptr(), var.data_ptr(), at, at + 4 * k))
            at += 8 * k
        _native.module().bn_update_running_each(places, counts, channels, [norm[5] for norm in norms])
        torch.autograd.graph.increment_version(tracked)
        return
    found = iter(statistics.split([k for k in channels for _ in range(2)]))
    for norm, shape in zip(norms, shapes):
        update_running(*norm[:2], next(found), next(found), norm[5], shape)


def _plain_floats(*tensors: Tensor) -> bool:
    """Whether the compiled module may write to these: dense float32 on the CPU, and nothing else watches."""
    return _plain.is_plain(tensors) and all(
        t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors
    )


def group_name(group: distributed.ProcessGroup | None) -> str:
    """A process group as an operator takes it, empty for none."""
    return "" if group is None else group.group_name


def empty_count(x: Tensor, training: bool, group: str) -> Tensor:
    """The uninitialised count of values behind a batch's statistics: one where a group shares them, else none."""
    return x.new_empty(1 if training and group else 0, dtype=torch.float64)


def no_group(group: str, op: str) -> None:
    """A second derivative through statistics of several processes is not there; torch's SyncBatchNorm has none either."""
    if group:
        raise RuntimeError(f"{op}: a gradient of a gradient was asked for, which synchronised statistics do not have")
