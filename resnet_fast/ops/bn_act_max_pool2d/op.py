"""The contract of bn_act_max_pool2d: the end of a network's stem, which writes no normalised map."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from resnet_fast import _library, backends
from resnet_fast.ops import checks, common, norm
from resnet_fast.ops.bn_act_max_pool2d import eager
from resnet_fast.ops.max_pool2d.op import output_size

F = torch.nn.functional
Window = tuple[list[int], list[int], list[int], list[int], list[int]]


def bn_act_max_pool2d(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: distributed.ProcessGroup | None = None,
) -> Tensor:
    """BatchNorm, ReLU and max pooling, without the normalised map between them.

    Shape:
        x: (N, C, H, W) in any memory format, channels_last is native; running_mean, running_var, weight, bias: (C,) or
        None; output: (N, C, P, Q) channels_last, of x's dtype, P and Q as torch's max_pool2d computes them.
    Maths:
        max_pool2d(relu((x - mean) / sqrt(var + eps) * weight + bias)); mean, var and the running statistics as in
        `bn_act`, in training over the processes of `group`. The gradient goes to the first largest of a window, and
        nowhere where that is not above 0.
    Cost:
        Training: x read twice, y and a byte an output written; backward reads x twice and writes dx. Saved for backward:
        x, two vectors, and a byte an output: the maximum's place, 255 where it gives no gradient (so neither y nor the
        map is needed). Windows of more than 254 places are left to `bn_act` and `max_pool2d`.
    Raises:
        As `bn_act` and `max_pool2d`.
    Source:
        He et al., 2015, whose stem it is; torch.nn.functional.batch_norm and max_pool2d for the values.
    """
    op = "bn_act_max_pool2d"
    checks.normalised(x, running_mean, running_var, weight, bias, None, training, "relu", eps, momentum, op, group)
    window = pool_window(x, kernel_size, stride, padding, dilation, ceil_mode)
    statistics = (None, None) if training else (running_mean, running_var)
    save = _library.needs_grad(x, weight, bias)
    y, _, mean, var, count = _forward(
        x, weight, bias, *statistics, training, eps, *window, save, checks.group_name(group)
    )
    if training:
        checks.update_running(running_mean, running_var, mean, var, momentum, x.shape, count)
    return y


def pool_window(x, kernel_size, stride, padding, dilation, ceil_mode) -> Window:
    """Kernel, stride, padding, dilation and output size as lists; refuses what max_pool2d refuses."""
    kernel = common.pair("kernel_size", kernel_size)
    if kernel[0] * kernel[1] >= eager.NO_PLACE:
        raise ValueError(f"bn_act_max_pool2d: wanted a window of at most 254 places, got {kernel[0]} x {kernel[1]}")
    stride = kernel if stride is None else common.pair("stride", stride)
    padding, dilation = common.pair("padding", padding), common.pair("dilation", dilation)
    size = output_size(x, kernel, stride, padding, dilation, ceil_mode)
    return list(kernel), list(stride), list(padding), list(dilation), size


def run(x, gamma, beta, mean, var, training, eps, kernel, stride, padding, dilation, size, save, group):
    """y, places, and in training the batch's mean, biased variance and, with a group, its count."""
    count = x.new_empty(0, dtype=torch.float64)
    found = mean is None
    if found:
        mean, var, count = norm.statistics(x, group)
    window = (kernel, stride, padding, dilation, size)
    y, places = backends.run("bn_act_max_pool2d", "fwd", x, gamma, beta, mean, var, eps, *window, save)
    none = x.new_empty(0, dtype=checks.statistics_dtype(x))
    return (y, places, mean, var, count) if found else (y, places, none, none.clone(), count)


def run_backward(
    dy, places, x, gamma, beta, mean, var, count, training, eps, kernel, stride, padding, dilation, group, wants
):
    """dx, dgamma, dbeta as far as wanted (empty where not)."""
    window = (kernel, stride, padding, dilation)
    if not (training and group):
        norms = (gamma, beta, mean, var, training, eps)
        return backends.run("bn_act_max_pool2d", "bwd", dy, places, x, *norms, *window, wants)
    # The sums go over the processes between the two passes, which one door does in one go.
    g = eager.unpooled(dy, places, x.shape[2], x.shape[3], *window)
    given = (gamma, beta, mean, var, count, training, eps, False, [*wants, False], group)
    return norm.backward(g, x, None, *given)[:3]


def _fake(x, gamma, beta, mean, var, training, eps, kernel, stride, padding, dilation, size, save, group):
    y = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    places = common.empty_output(y, torch.uint8) if save else x.new_empty(0, dtype=torch.uint8)
    statistics = x.new_empty(x.shape[1] if mean is None else 0, dtype=checks.statistics_dtype(x))
    return y, places, statistics, torch.empty_like(statistics), checks.empty_count(x, training, group)


def _fake_backward(
    dy, places, x, gamma, beta, mean, var, count, training, eps, kernel, stride, padding, dilation, group, wants
):
    def vector(want: bool) -> Tensor:
        return x.new_empty(x.shape[1] if want else 0, dtype=checks.statistics_dtype(x) if want else x.dtype)

    return common.empty_output(x) if wants[0] else x.new_empty(0), vector(wants[1]), vector(wants[2])


def differentiable(x, gamma, beta, mean, var, training, eps, kernel, stride, padding, dilation, size) -> Tensor:
    """y as a graph autograd can differentiate twice; with `training` mean and var are x's own."""
    statistics = (None, None) if training else (mean, var)
    y = torch.relu(F.batch_norm(x, *statistics, gamma, beta, training, 0.0, eps))
    floor = [common.conv_output_size(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1)]
    return F.max_pool2d(y, kernel, stride, padding, dilation, size != floor)


def _setup(ctx, inputs, output) -> None:
    x, gamma, beta, mean, var, ctx.training, ctx.eps, *ctx.window, ctx.save, ctx.group = inputs
    _, places, *found, count = output
    ctx.save_for_backward(x, places, gamma, beta, *(found if mean is None else (mean, var)), count)
    # Without the places there is no gradient.
    ctx.mark_non_differentiable(*(output[1:] if ctx.save else output))


def _backward(ctx, dy: Tensor, *_):
    x, places, gamma, beta, mean, var, count = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled():  # a graph of the gradient is wanted: torch's own operators are run again
        checks.no_group(ctx.group, "bn_act_max_pool2d")
        out = differentiable(x, gamma, beta, mean, var, ctx.training, ctx.eps, *ctx.window)
        wanted = [t for t, want in zip((x, gamma, beta), wants) if want]
        found = iter(torch.autograd.grad(out, wanted, dy, create_graph=True))
        dx, dgamma, dbeta = (next(found) if want else None for want in wants)
    else:
        given = (gamma, beta, mean, var, count, ctx.training, ctx.eps, *ctx.window[:4], ctx.group)
        grads = _gradient(dy, places, x, *given, wants)
        dx, dgamma, dbeta = (g if want else None for g, want in zip(grads, wants))
    return (
        None if dx is None else common.like_input(dx, x),
        None if dgamma is None else dgamma.to(gamma.dtype),
        None if dbeta is None else dbeta.to(beta.dtype),
        *(None,) * 11,
    )


_forward = _library.compose(
    "bn_act_max_pool2d",
    "(Tensor x, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, bool training, float eps, int[2] kernel, "
    "int[2] stride, int[2] padding, int[2] dilation, int[2] size, bool save, str group) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=run,
    fake=_fake,
)
_gradient = _library.compose(
    "bn_act_max_pool2d_backward",
    "(Tensor dy, Tensor places, Tensor x, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, Tensor count, "
    "bool training, float eps, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, str group, bool[3] wants) "
    "-> (Tensor, Tensor, Tensor)",
    run=run_backward,
    fake=_fake_backward,
)
_library.autograd("bn_act_max_pool2d", _setup, _backward)
