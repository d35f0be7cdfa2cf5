"""The contract of conv_bn_act."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from resnet_fast import _library, backends
from resnet_fast.ops import checks, common
from resnet_fast.ops.bn_act.op import bn_act
from resnet_fast.ops.conv2d.op import conv2d
from resnet_fast.ops.conv_bn_act import eager


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str | None = "relu",
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    group: distributed.ProcessGroup | None = None,
) -> Tensor:
    """Convolution, BatchNorm, an optional residual and ReLU.

    Shape:
        x: (N, C, H, W) in any memory format, channels_last is native; weight: (K, C / groups, R, S); bias, running_mean,
        running_var, bn_weight, bn_bias: (K,) or None; residual: like the output (N, K, P, Q), which is channels_last.
        One floating dtype for x, weight and bias (autocast casts these three); the vectors of the norm may be float32.
    Maths:
        y = act(bn(conv2d(x, weight) + bias) + residual), act "relu" or None; bn as in `bn_act`, in training
        over the processes of `group`.
    Cost:
        Evaluation without gradients: one kernel, scale, shift, residual and ReLU in the convolution's epilogue (x,
        weight, residual read once, y written once). With gradients or batch statistics: `conv2d`, then `bn_act`, which
        keep the convolution's output for backward.
    Raises:
        As `conv2d` and `bn_act`.
    Source:
        He et al., 2015; folding a BatchNorm with known statistics into a convolution is folklore (Jacob et al., 2018).
    """
    if training or _library.needs_grad(x, weight, bias, bn_weight, bn_bias, residual):
        with backends.normalised_next(training):
            z = conv2d(x, weight, bias, stride, padding, dilation, groups)
        return bn_act(z, running_mean, running_var, bn_weight, bn_bias, residual, training, momentum, eps, act, group)
    x, stride, padding, dilation = common.convolution_arguments(
        "conv_bn_act", x, weight, bias, stride, padding, dilation, groups
    )
    channels = weight.shape[0]
    checks.activation(act, "conv_bn_act")
    checks.known_statistics(running_mean, running_var, training, "conv_bn_act")
    checks.positive_eps(eps, training, "conv_bn_act")
    vectors = {"running_mean": running_mean, "running_var": running_var, "bn_weight": bn_weight, "bn_bias": bn_bias}
    for name, t in vectors.items():
        common.check_vector("conv_bn_act", name, t, channels)
    common.check_same_device("conv_bn_act", x=x, **vectors, residual=residual)
    if residual is not None:
        checks.residual_like(residual, common.convolution_shape(x, weight, stride, padding, dilation), "conv_bn_act")
    statistics = (bn_weight, bn_bias, running_mean, running_var)
    return _forward(x, weight, bias, *statistics, residual, eps, act == "relu", stride, padding, dilation, groups)


def _fake(x, weight, bias, gamma, beta, mean, var, residual, eps, relu, stride, padding, dilation, groups):
    y = common.empty_convolution(x, weight, stride, padding, dilation)
    return y if residual is None else common.empty_output(y, torch.result_type(y, residual))


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.relu, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy: Tensor):
    # Whoever calls the operator itself with gradients on has kept nothing but the inputs: the eager room is run again.
    again = torch.is_grad_enabled()  # a graph of the gradient is wanted
    with torch.enable_grad():
        tensors = list(ctx.saved_tensors)
        if not again:
            tensors = [
                None if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, ctx.needs_input_grad)
            ]
        y = eager.fwd(*tensors, ctx.eps, ctx.relu, ctx.stride, ctx.padding, ctx.dilation, ctx.groups)
        wanted = [t for t, n in zip(tensors, ctx.needs_input_grad) if n]
        grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=again))
    return (*(next(grads) if n else None for n in ctx.needs_input_grad[:8]), *(None,) * 6)


_forward = _library.define(
    "conv_bn_act",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, Tensor? residual, "
    "float eps, bool relu, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
    fake=_fake,
)
_library.autograd("conv_bn_act", _setup, _backward)
_library.autocast("conv_bn_act", ("x", "weight", "bias"))
