"""The contract of bn_act_global_avg_pool2d: the end of a network's last block, which writes no map."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from resnet_fast import _library, backends
from resnet_fast.ops import checks, common, norm
from resnet_fast.ops.bn_act_global_avg_pool2d import eager


def bn_act_global_avg_pool2d(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: distributed.ProcessGroup | None = None,
) -> Tensor:
    """BatchNorm, an optional residual, ReLU and the mean over each image, without the map between them.

    Shape:
        x: (N, C, H, W) in any memory format, channels_last is native; residual: like x; running_mean, running_var,
        weight, bias: (C,) or None; output: (N, C, 1, 1), of x's dtype (promoted with residual's).
    Maths:
        The mean over H and W of relu((x - mean) / sqrt(var + eps) * weight + bias + residual); mean, var and the
        running statistics as in `bn_act`, in training over the processes of `group`.
    Cost:
        Training: x read twice, residual once; backward reads both once and x and the masked gradient once more, and
        writes the two gradients. Saved for backward: x, residual and two vectors; not the map, whose sign is found again.
    Raises:
        As `bn_act`; RuntimeError: an image without pixels, which has no mean.
    Source:
        He et al., 2015, whose networks end so; torch.nn.functional.batch_norm and adaptive_avg_pool2d for the values.
    """
    op = "bn_act_global_avg_pool2d"
    checks.normalised(x, running_mean, running_var, weight, bias, residual, training, "relu", eps, momentum, op, group)
    if x.shape[2] * x.shape[3] == 0:
        raise RuntimeError(f"{op}: wanted images with pixels, got x of shape {tuple(x.shape)}")
    statistics = (None, None) if training else (running_mean, running_var)
    y, mean, var, count = _forward(x, weight, bias, *statistics, residual, training, eps, checks.group_name(group))
    if training:
        checks.update_running(running_mean, running_var, mean, var, momentum, x.shape, count)
    return y


def _run(x, gamma, beta, mean, var, residual, training, eps, group):
    count = x.new_empty(0, dtype=torch.float64)
    if training:
        mean, var, count = norm.statistics(x, group)

    def parts():
        y = backends.run("bn_act", "fwd", x, gamma, beta, mean, var, residual, False, eps, True)[0]
        return eager.pooled(y)

    y = backends.run_whole("bn_act_global_avg_pool2d", "fwd", parts, x, gamma, beta, mean, var, residual, eps)
    none = x.new_empty(0, dtype=checks.statistics_dtype(x))
    return (y, mean, var, count) if training else (y, none, none.clone(), count)


def _run_backward(dy, x, gamma, beta, mean, var, residual, count, training, eps, group, wants):
    def parts():
        y = None
        if residual is not None:  # without a residual bn_act's backward finds the mask from x
            y = backends.run("bn_act", "fwd", x, gamma, beta, mean, var, residual, False, eps, True)[0]
        given = (gamma, beta, mean, var, count, training, eps, True, wants, group)
        return norm.backward(eager.spread(dy, x), x, y, *given)

    if training and group:  # the sums go over the processes between the two passes, which one door does in one go
        return parts()
    given = (dy, x, gamma, beta, mean, var, residual, training, eps, wants)
    return backends.run_whole("bn_act_global_avg_pool2d", "bwd", parts, *given)


def _fake(x, gamma, beta, mean, var, residual, training, eps, group):
    dtype = x.dtype if residual is None else torch.result_type(x, residual)
    y = torch.empty((*x.shape[:2], 1, 1), dtype=dtype, device=x.device, memory_format=torch.channels_last)
    statistics = x.new_empty(x.shape[1] if training else 0, dtype=checks.statistics_dtype(x))
    return y, statistics, torch.empty_like(statistics), checks.empty_count(x, training, group)


def _fake_backward(dy, x, gamma, beta, mean, var, residual, count, training, eps, group, wants):
    def vector(want: bool) -> Tensor:
        return x.new_empty(x.shape[1] if want else 0, dtype=checks.statistics_dtype(x) if want else x.dtype)

    none = x.new_empty(0)
    dx = common.empty_output(x) if wants[0] else none
    return dx, vector(wants[1]), vector(wants[2]), common.empty_output(x, dy.dtype) if wants[3] else none.clone()


def _setup(ctx, inputs, output) -> None:
    x, gamma, beta, mean, var, residual, ctx.training, ctx.eps, ctx.group = inputs
    _, *found, count = output
    ctx.save_for_backward(x, gamma, beta, *(found if ctx.training else (mean, var)), residual, count)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dy: Tensor, *_):
    x, gamma, beta, mean, var, residual, count = ctx.saved_tensors
    wants = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5)]
    if torch.is_grad_enabled():  # a graph of the gradient is wanted: torch's own operators are run again
        checks.no_group(ctx.group, "bn_act_global_avg_pool2d")
        tensors = (x, gamma, beta, residual)
        out = eager.differentiable(*tensors, mean, var, ctx.training, ctx.eps)
        found = iter(torch.autograd.grad(out, [t for t, w in zip(tensors, wants) if w], dy, create_graph=True))
        dx, dgamma, dbeta, dresidual = (next(found) if want else None for want in wants)
    else:
        given = (x, gamma, beta, mean, var, residual, count, ctx.training, ctx.eps, ctx.group)
        grads = _gradient(dy, *given, wants)
        dx, dgamma, dbeta, dresidual = (g if want else None for g, want in zip(grads, wants))
    return (
        None if dx is None else common.like_input(dx, x),
        None if dgamma is None else dgamma.to(gamma.dtype),
        None if dbeta is None else dbeta.to(beta.dtype),
        None,
        None,
        None if dresidual is None else dresidual.to(residual.dtype),
        *(None,) * 3,
    )


_forward = _library.compose(
    "bn_act_global_avg_pool2d",
    "(Tensor x, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, Tensor? residual, bool training, float eps, "
    "str group) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_run,
    fake=_fake,
)
_gradient = _library.compose(
    "bn_act_global_avg_pool2d_backward",
    "(Tensor dy, Tensor x, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, Tensor? residual, Tensor count, "
    "bool training, float eps, str group, bool[4] wants) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
)
_library.autograd("bn_act_global_avg_pool2d", _setup, _backward)
