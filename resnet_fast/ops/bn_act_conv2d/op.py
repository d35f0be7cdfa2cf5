"""The contract of bn_act_conv2d: the inner link of a residual block's chain, which keeps no normalised activation."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from resnet_fast import _library, backends
from resnet_fast.ops import checks, common, norm
from resnet_fast.ops.bn_act_conv2d import eager
from resnet_fast.ops.conv2d.op import gradients


def bn_act_conv2d(
    z: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    group: distributed.ProcessGroup | None = None,
) -> Tensor:
    """BatchNorm and ReLU of one convolution's output, then the next convolution; the activation between is not kept.

    Shape:
        z: (N, C, H, W), the output of the convolution before, in any memory format; weight: (K, C / groups, R, S);
        running_mean, running_var, bn_weight, bn_bias: (C,) or None; bias: (K,) or None; output: (N, K, P, Q)
        channels_last. Autocast casts weight and bias; z keeps its dtype.
    Maths:
        conv2d(relu((z - mean) / sqrt(var + eps) * bn_weight + bn_bias), weight) + bias; mean, var and the running
        statistics as in `bn_act`, in training over the processes of `group`.
    Cost:
        Forward as `bn_act` and `conv2d`. Saved for backward: z and two vectors; the activation, which torch keeps, is
        computed again in backward: one more read and write of it, for as many bytes less held. In the triton room it is
        computed as tiles are loaded, and backward moves fewer bytes than its parts (README).
    Raises:
        As `conv2d` and `bn_act`.
    Source:
        Rota Bulò et al., In-Place Activated BatchNorm, 2018; Chen et al., Training Deep Nets with Sublinear Memory
        Cost, 2016: of what a block keeps, the normalised activations are the cheapest to compute again.
    """
    op = "bn_act_conv2d"
    checks.normalised(
        z, running_mean, running_var, bn_weight, bn_bias, None, training, "relu", eps, momentum, op, group
    )
    if isinstance(padding, str):
        raise ValueError(f'{op}: wanted padding as numbers, got "{padding}"')
    _, stride, padding, dilation = common.convolution_arguments(op, z, weight, bias, stride, padding, dilation, groups)
    statistics = (None, None) if training else (running_mean, running_var)
    window = (stride, padding, dilation, groups)
    tensors = (z, bn_weight, bn_bias, *statistics, weight, bias)
    out, mean, var, count = _forward(*tensors, training, eps, *window, checks.group_name(group))
    if training:
        checks.update_running(running_mean, running_var, mean, var, momentum, z.shape, count)
    return out


def _run(z, gamma, beta, mean, var, weight, bias, training, eps, stride, padding, dilation, groups, group):
    window = (stride, padding, dilation, groups)

    def parts():
        y, *found = norm.forward(z, gamma, beta, mean, var, None, training, eps, True, group)
        return backends.run("conv2d", "fwd", y, weight, bias, *window), *found

    if training and group:  # the statistics are not this process's alone
        return parts()
    found = backends.run_whole(
        "bn_act_conv2d", "fwd", parts, z, gamma, beta, mean, var, weight, bias, training, eps, *window
    )
    return found if len(found) == 4 else (*found, z.new_empty(0, dtype=torch.float64))


def _run_backward(
    dout, z, gamma, beta, mean, var, count, weight, bias, training, eps, stride, padding, dilation, groups, group, wants
):
    window = (stride, padding, dilation, groups)

    def parts():
        y = backends.run("bn_act", "fwd", z, gamma, beta, mean, var, None, False, eps, True)[0]
        first = any(wants[:3])
        dy, dw, db = gradients(dout, y, weight, bias, *window, [first, wants[3], wants[4]])
        del y
        if not first:
            none = z.new_empty(0)
            return none, none.clone(), none.clone(), dw, db
        given = (gamma, beta, mean, var, count, training, eps, True, [*wants[:3], False], group)
        dz, dgamma, dbeta, _ = norm.backward(dy, z, None, *given)
        return dz, dgamma, dbeta, dw, db

    if training and group:  # the sums dz needs are not this process's alone
        return parts()
    given = (dout, z, gamma, beta, mean, var, weight, bias, training, eps, *window, wants)
    dz, dgamma, dbeta, dw, db = backends.run_whole("bn_act_conv2d", "bwd", parts, *given)
    return dz, dgamma, dbeta, common.like_weight(dw, weight) if wants[3] else dw, db


def _fake(z, gamma, beta, mean, var, weight, bias, training, eps, stride, padding, dilation, groups, group):
    statistics = z.new_empty(z.shape[1] if training else 0, dtype=checks.statistics_dtype(z))
    out = common.empty_convolution(z, weight, stride, padding, dilation)
    return out, statistics, torch.empty_like(statistics), checks.empty_count(z, training, group)


def _fake_backward(
    dout, z, gamma, beta, mean, var, count, weight, bias, training, eps, stride, padding, dilation, groups, group, wants
):
    def vector(want: bool) -> Tensor:
        return z.new_empty(z.shape[1] if want else 0, dtype=checks.statistics_dtype(z) if want else z.dtype)

    dz = common.empty_output(z) if wants[0] else z.new_empty(0)
    _, dw, db = common.empty_convolution_gradients(z, weight, [False, *wants[3:]])
    return dz, vector(wants[1]), vector(wants[2]), dw, db


def _setup(ctx, inputs, output) -> None:
    z, gamma, beta, mean, var, weight, bias, ctx.training, ctx.eps, *ctx.window, ctx.group = inputs
    _, *found, count = output
    ctx.save_for_backward(z, gamma, beta, *(found if ctx.training else (mean, var)), count, weight, bias)
    ctx.mark_non_differentiable(*found, count)


def _backward(ctx, dout: Tensor, *_):
    z, gamma, beta, mean, var, count, weight, bias = ctx.saved_tensors
    wants = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5, 6)]
    if torch.is_grad_enabled():  # a graph of the gradient is wanted: torch's own operators are run again
        checks.no_group(ctx.group, "bn_act_conv2d")
        tensors = (z, gamma, beta, weight, bias)
        out = eager.differentiable(*tensors, mean, var, ctx.training, ctx.eps, *ctx.window)
        wanted = [t for t, want in zip(tensors, wants) if want]
        found = iter(torch.autograd.grad(out, wanted, dout, create_graph=True))
        dz, dgamma, dbeta, dw, db = (next(found) if want else None for want in wants)
    else:
        given = (z, gamma, beta, mean, var, count, weight, bias is not None, ctx.training, ctx.eps, *ctx.window)
        grads = _gradient(dout, *given, ctx.group, wants)
        dz, dgamma, dbeta, dw, db = (g if want else None for g, want in zip(grads, wants))
    return (
        None if dz is None else common.like_input(dz, z),
        None if dgamma is None else dgamma.to(gamma.dtype),
        None if dbeta is None else dbeta.to(beta.dtype),
        None,
        None,
        dw,
        db,
        *(None,) * 7,
    )


_forward = _library.compose(
    "bn_act_conv2d",
    "(Tensor z, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, Tensor weight, Tensor? bias, bool training, "
    "float eps, int[2] stride, int[2] padding, int[2] dilation, int groups, str group) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    run=_run,
    fake=_fake,
)
_gradient = _library.compose(
    "bn_act_conv2d_backward",
    "(Tensor dout, Tensor z, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, Tensor count, Tensor weight, bool bias, "
    "bool training, float eps, int[2] stride, int[2] padding, int[2] dilation, int groups, str group, bool[5] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
)
_library.autograd("bn_act_conv2d", _setup, _backward)
_library.autocast("bn_act_conv2d", ("z", "weight", "bias"), rounded_by_rooms=("weight", "bias"))
