"""The contract of bn_act."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from resnet_fast import _library
from resnet_fast.ops import checks, common, norm
from resnet_fast.ops.bn_act import eager


def bn_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str | None = "relu",
    group: distributed.ProcessGroup | None = None,
) -> Tensor:
    """BatchNorm, an optional residual and ReLU in one pass (two with batch statistics).

    Shape:
        x: (N, C, H, W) in any memory format, channels_last is native; residual: like x; running_mean, running_var,
        weight, bias: (C,) or None. Statistics are float32 (float64 for float64 x) whatever x's dtype.
        The output is channels_last, of x's dtype (promoted with residual's).
    Maths:
        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual), act "relu" or None. With `training` mean and
        var are the batch's, and the running statistics move to (1 - momentum) * running + momentum * batch, var unbiased.
        With `group` the batch is that of all its processes (SyncBatchNorm); dgamma and dbeta stay this process's sums.
    Cost:
        Training: x read twice, residual once, y written once; backward two passes. Evaluation: one pass. Saved for
        backward: x, two vectors, and y where a residual was added (its sign is the ReLU's mask, else recomputed from x).
    Raises:
        ValueError: one value per channel or eps of 0 in training, one running statistic without the other, an unknown act.
        RuntimeError: x is not four-dimensional, vectors or residual of the wrong shape, tensors on different devices.
        NotImplementedError: a dtype that is not floating. TypeError: momentum is not a number.
    Source:
        Ioffe and Szegedy, Batch Normalization, 2015; torch.nn.functional.batch_norm for the running statistics.
    """
    checks.normalised(
        x, running_mean, running_var, weight, bias, residual, training, act, eps, momentum, "bn_act", group
    )
    if training and group is not None:
        given = (x, weight, bias, residual, eps, act == "relu", checks.group_name(group))
        y, mean, var, count = _synchronised(*given)
        checks.update_running(running_mean, running_var, mean, var, momentum, x.shape, count)
        return y
    statistics = (None, None) if training else (running_mean, running_var)
    y, mean, var = _forward(x, weight, bias, *statistics, residual, training, eps, act == "relu")
    if training:
        checks.update_running(running_mean, running_var, mean, var, momentum, x.shape)
    return y


def _fake(x, weight, bias, mean, var, residual, training, eps, relu):
    dtype = x.dtype if residual is None else torch.result_type(x, residual)
    statistics = x.new_empty(x.shape[1] if training else 0, dtype=checks.statistics_dtype(x))
    return common.empty_output(x, dtype), statistics, torch.empty_like(statistics)


def _fake_backward(dy, x, y, weight, bias, mean, var, training, eps, relu, wants):
    c = x.shape[1]
    vector = x.new_empty(c if wants[1] or wants[2] else 0, dtype=checks.statistics_dtype(x))
    none = x.new_empty(0)
    return (
        common.empty_output(x) if wants[0] else none,
        vector if wants[1] else none,
        torch.empty_like(vector) if wants[2] else none.clone(),
        common.empty_output(dy) if wants[3] else none.clone(),
    )


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, mean, var, residual, ctx.training, ctx.eps, ctx.relu = inputs
    y, batch_mean, batch_var = output
    statistics = (batch_mean, batch_var) if ctx.training else (mean, var)
    # Where a residual was added the sign of y is the mask; without one x tells it, and y need not be kept.
    ctx.save_for_backward(x, y if ctx.relu and residual is not None else None, weight, bias, *statistics)
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(batch_mean, batch_var)


def _backward(ctx, dy: Tensor, *_):
    x, y, weight, bias, mean, var = ctx.saved_tensors
    wants = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5)]
    residual = wants[3]
    wants[3] = residual and ctx.relu  # without ReLU it is dy itself, and an operator may not return its input
    # A graph of the gradient is wanted: torch's own backward operators can be differentiated again, ours cannot.
    formula = eager.bwd if torch.is_grad_enabled() else _gradient
    dx, dweight, dbias, dresidual = formula(dy, x, y, weight, bias, mean, var, ctx.training, ctx.eps, ctx.relu, wants)
    return (
        common.like_input(dx, x) if wants[0] else None,
        dweight.to(weight.dtype) if wants[1] else None,
        dbias.to(bias.dtype) if wants[2] else None,
        None,
        None,
        (dresidual if ctx.relu else dy).to(ctx.residual_dtype) if residual else None,
        None,
        None,
        None,
    )


_forward = _library.define(
    "bn_act",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? residual, bool training, float eps, "
    "bool relu) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
)
_gradient = _library.define(
    "bn_act_backward",
    "(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, bool training, float eps, "
    "bool relu, bool[4] wants) -> (Tensor, Tensor, Tensor, Tensor)",
    door="bwd",
    op="bn_act",
    fake=_fake_backward,
)
_library.autograd("bn_act", _setup, _backward)


def _run_synchronised(x, weight, bias, residual, eps, relu, group):
    return norm.forward(x, weight, bias, None, None, residual, True, eps, relu, group)


def _run_synchronised_backward(dy, x, y, weight, bias, mean, var, count, eps, relu, group, wants):
    return norm.backward(dy, x, y, weight, bias, mean, var, count, True, eps, relu, wants, group)


def _fake_synchronised(x, weight, bias, residual, eps, relu, group):
    return *_fake(x, weight, bias, None, None, residual, True, eps, relu), checks.empty_count(x, True, group)


def _fake_synchronised_backward(dy, x, y, weight, bias, mean, var, count, eps, relu, group, wants):
    return _fake_backward(dy, x, y, weight, bias, mean, var, True, eps, relu, wants)


def _setup_synchronised(ctx, inputs, output) -> None:
    x, weight, bias, residual, ctx.eps, ctx.relu, ctx.group = inputs
    y, mean, var, count = output
    ctx.save_for_backward(x, y if ctx.relu and residual is not None else None, weight, bias, mean, var, count)
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(mean, var, count)


def _backward_synchronised(ctx, dy: Tensor, *_):
    x, y, weight, bias, mean, var, count = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:4])
    if torch.is_grad_enabled():
        checks.no_group(ctx.group, "bn_act")
    given = (dy, x, y, weight, bias, mean, var, count, ctx.eps, ctx.relu, ctx.group)
    dx, dweight, dbias, dresidual = _synchronised_gradient(*given, [*wants[:3], wants[3] and ctx.relu])
    return (
        common.like_input(dx, x) if wants[0] else None,
        dweight.to(weight.dtype) if wants[1] else None,
        dbias.to(bias.dtype) if wants[2] else None,
        (dresidual if ctx.relu else dy).to(ctx.residual_dtype) if wants[3] else None,
        *(None,) * 3,
    )


_synchronised = _library.compose(
    "bn_act_synchronised",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, bool relu, str group) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    run=_run_synchronised,
    fake=_fake_synchronised,
)
_synchronised_gradient = _library.compose(
    "bn_act_synchronised_backward",
    "(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor count, float eps, "
    "bool relu, str group, bool[4] wants) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_run_synchronised_backward,
    fake=_fake_synchronised_backward,
)
_library.autograd("bn_act_synchronised", _setup_synchronised, _backward_synchronised)
