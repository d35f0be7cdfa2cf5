"""The contract of recomputed_conv_bn_act: conv_bn_act that keeps its input instead of the convolution's output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, distributed

from resnet_fast import _library, backends
from resnet_fast.ops import checks, common, norm
from resnet_fast.ops.bn_act_max_pool2d import op as pooled
from resnet_fast.ops.conv2d.op import gradients
from resnet_fast.ops.recomputed_conv_bn_act import eager

OP = "recomputed_conv_bn_act"


class Norm(NamedTuple):
    """A BatchNorm's tensors and settings, as bn_act takes them."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float
    group: distributed.ProcessGroup | None = None


class Pool(NamedTuple):
    """A max pool's window, as max_pool2d takes it."""

    kernel_size: int | tuple[int, int]
    stride: int | tuple[int, int] | None = None
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    ceil_mode: bool = False


def recomputed_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: Norm,
    residual: Tensor | None = None,
    act: str | None = "relu",
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    before: Norm | None = None,
    pool: Pool | None = None,
) -> Tensor:
    """Convolution, BatchNorm, residual and ReLU, the convolution's output computed again in backward instead of kept.

    Shape:
        x: (N, C, H, W) in any memory format, channels_last is native; weight: (K, C / groups, R, S); bias: (K,) or None;
        residual: like the convolution's output (N, K, P, Q); output channels_last, pooled where `pool` is given. The
        vectors of `bn` are (K,), those of `before` (C,). Autocast casts x, weight and bias.
    Maths:
        y = act(bn(conv2d(a, weight) + bias) + residual) with a = relu(before(x)), or x itself; then max_pool2d. The norms
        as in `bn_act`, their running statistics moved as there.
    Cost:
        Forward as `bn_act`, `conv2d` and `bn_act` or `bn_act_max_pool2d`. Saved for backward: x, four vectors, y where a
        residual was added, and a byte an output where it was pooled. Backward computes a and the convolution again.
    Raises:
        As these operators. ValueError: a residual or no ReLU together with `pool`, padding by name.
    Source:
        Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016: a convolution over few values per output (1x1,
        or of three channels) costs little to compute again for the largest maps a network keeps.
    """
    if isinstance(padding, str):
        raise ValueError(f'{OP}: wanted padding as numbers, got "{padding}"')
    if pool is not None and (residual is not None or act != "relu"):
        raise ValueError(f"{OP}: wanted a ReLU and no residual before a pool, got act={act!r} and a residual or not")
    checks.activation(act, OP)
    x, stride, padding, dilation = common.convolution_arguments(OP, x, weight, bias, stride, padding, dilation, groups)
    shape = common.convolution_shape(x, weight, stride, padding, dilation)
    _check_norm(x, bn, shape)
    if before is not None:
        _check_norm(x, before, x.shape)
    checks.residual_like(residual, shape, OP)
    common.check_same_device(OP, x=x, residual=residual)
    given = None if pool is None else pooled.pool_window(x.new_empty(shape, device="meta"), *pool)
    statistics0 = (None, None) if before is None or before.training else before[:2]
    statistics = (None, None) if bn.training else bn[:2]
    first = Norm(None, None, None, None, False, 0.0, 1.0) if before is None else before
    tensors = (x, *first[2:4], *statistics0, weight, bias, *bn[2:4], *statistics, residual)
    save = _library.needs_grad(x, *first[2:4], weight, bias, *bn[2:4])
    y, _, *found = _forward(
        *tensors, before is not None, first.training, first.eps, checks.group_name(first.group),
        bn.training, bn.eps, act == "relu", checks.group_name(bn.group), stride, padding, dilation, groups,
        [] if given is None else [size for pair in given for size in pair], save,
    )  # fmt: skip
    if first.training:
        checks.update_running(*first[:2], *found[:2], first.momentum, x.shape, found[2])
    if bn.training:
        checks.update_running(*bn[:2], *found[3:5], bn.momentum, shape, found[5])
    return y


def _check_norm(x: Tensor, bn: Norm, shape: tuple[int, ...]) -> None:
    vectors = dict(zip(("running_mean", "running_var", "bn_weight", "bn_bias"), bn[:4]))
    for name, t in vectors.items():
        common.check_vector(OP, name, t, shape[1])
    common.check_same_device(OP, x=x, **vectors)
    checks.known_statistics(bn.running_mean, bn.running_var, bn.training, OP)
    checks.positive_eps(bn.eps, bn.training, OP)
    if bn.training and bn.group is None:
        checks.several_values(shape)


def _run(
    x, gamma0, beta0, mean0, var0, weight, bias, gamma, beta, mean, var, residual, before, training0, eps0, group0,
    training, eps, relu, group, stride, padding, dilation, groups, pool, save,
):  # fmt: skip
    none = x.new_empty(0, dtype=checks.statistics_dtype(x))
    if pool and not (before or training or save):  # inference: a room may have the stem in one kernel
        y = _stem(x, weight, bias, gamma, beta, mean, var, eps, stride, padding, dilation, groups, pool)
        empty = (none, none.clone(), x.new_empty(0, dtype=torch.float64))
        return y, x.new_empty(0, dtype=torch.uint8), *empty, *(t.clone() for t in empty)
    found0 = [none, none.clone(), x.new_empty(0, dtype=torch.float64)]
    if before:
        x, *found0 = norm.forward(x, gamma0, beta0, mean0, var0, None, training0, eps0, True, group0)
    z = backends.run("conv2d", "fwd", x, weight, bias, stride, padding, dilation, groups)
    del x
    if pool:
        given = (z, gamma, beta, mean, var, training, eps, *eager.windows(pool), save, group)
        y, places, *found = pooled.run(*given)
    else:
        y, *found = norm.forward(z, gamma, beta, mean, var, residual, training, eps, relu, group)
        places = z.new_empty(0, dtype=torch.uint8)
    return y, places, *found0, *found


def _stem(x, weight, bias, gamma, beta, mean, var, eps, stride, padding, dilation, groups, pool):
    norm_, window = (gamma, beta, mean, var), (stride, padding, dilation, groups)
    weight, bias = common.rounded(weight, x), common.rounded(bias, x)

    def parts():
        y = backends.run("conv_bn_act", "fwd", x, weight, bias, *norm_, None, eps, True, *window)
        return backends.run("max_pool2d", "fwd", y, *eager.windows(pool), False)[0]

    none = (None,) * 4
    return backends.run_whole(
        OP, "fwd", parts, x, *none, weight, bias, *norm_, None, False, 1.0, eps, True, *window, pool
    )


def _run_backward(
    dy, x, y, places, gamma0, beta0, mean0, var0, count0, weight, bias, gamma, beta, mean, var, count, before,
    training0, eps0, group0, training, eps, relu, group, stride, padding, dilation, groups, pool, wants,
):  # fmt: skip
    window = (stride, padding, dilation, groups)
    a = x
    if before:
        a = backends.run("bn_act", "fwd", x, gamma0, beta0, mean0, var0, None, False, eps0, True)[0]
    z = backends.run("conv2d", "fwd", a, weight, bias, *window)
    inner = any(wants[:5])
    if pool:
        given = (gamma, beta, mean, var, count, training, eps, *eager.windows(pool)[:4], group)
        dz, dgamma, dbeta = pooled.run_backward(dy, places, z, *given, [inner, *wants[5:7]])
        dresidual = z.new_empty(0)
    else:
        given = (gamma, beta, mean, var, count, training, eps, relu, [inner, *wants[5:8]], group)
        dz, dgamma, dbeta, dresidual = norm.backward(dy, z, y, *given)
    del z
    none = x.new_empty(0)
    if not inner:
        return *(none.clone() for _ in range(5)), dgamma, dbeta, dresidual
    first = any(wants[:3])
    da, dw, db = gradients(dz, a, weight, bias is not None, *window, [first, *wants[3:5]])
    del a, dz
    if not before:
        return da, none, none.clone(), dw, db, dgamma, dbeta, dresidual
    if not first:
        return none, none.clone(), none.clone(), dw, db, dgamma, dbeta, dresidual
    given = (gamma0, beta0, mean0, var0, count0, training0, eps0, True, [*wants[:3], False], group0)
    dx, dgamma0, dbeta0, _ = norm.backward(da, x, None, *given)
    return dx, dgamma0, dbeta0, dw, db, dgamma, dbeta, dresidual


def _fake(
    x, gamma0, beta0, mean0, var0, weight, bias, gamma, beta, mean, var, residual, before, training0, eps0, group0,
    training, eps, relu, group, stride, padding, dilation, groups, pool, save,
):  # fmt: skip
    def found(t: Tensor, training: bool, group: str) -> tuple[Tensor, Tensor, Tensor]:
        vector = t.new_empty(t.shape[1] if training else 0, dtype=checks.statistics_dtype(t))
        return vector, torch.empty_like(vector), checks.empty_count(t, training, group)

    z = common.empty_convolution(x, weight, stride, padding, dilation)
    y = z if residual is None else common.empty_output(z, torch.result_type(z, residual))
    places = x.new_empty(0, dtype=torch.uint8)
    if pool:
        shape = (*z.shape[:2], *pool[8:])
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        places = common.empty_output(y, torch.uint8) if save else places
    return y, places, *found(x, before and training0, group0), *found(z, training, group)


def _fake_backward(
    dy, x, y, places, gamma0, beta0, mean0, var0, count0, weight, bias, gamma, beta, mean, var, count, before,
    training0, eps0, group0, training, eps, relu, group, stride, padding, dilation, groups, pool, wants,
):  # fmt: skip
    def vector(size: int, want: bool) -> Tensor:
        return x.new_empty(size if want else 0, dtype=checks.statistics_dtype(x) if want else x.dtype)

    dx = common.empty_output(x) if wants[0] else x.new_empty(0)
    _, dw, db = common.empty_convolution_gradients(x, weight, [False, *wants[3:5]])
    c, k = x.shape[1], weight.shape[0]
    dresidual = common.empty_output(dy) if wants[7] else x.new_empty(0)
    inner = (dx, vector(c, wants[1]), vector(c, wants[2]), dw, db)
    return *inner, vector(k, wants[5]), vector(k, wants[6]), dresidual


def _setup(ctx, inputs, output) -> None:
    x, gamma0, beta0, mean0, var0, weight, bias, gamma, beta, mean, var, residual, *settings, _ = inputs
    _, training0, _, _, training, _, ctx.relu, *_ = ctx.settings = settings
    y, places, *found = output
    statistics0 = found[:2] if training0 else (mean0, var0)
    statistics = found[3:5] if training else (mean, var)
    kept = y if ctx.relu and residual is not None else None
    ctx.save_for_backward(
        x, kept, places, gamma0, beta0, *statistics0, found[2], weight, bias, gamma, beta, *statistics, found[5]
    )
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(places, *found)


def _backward(ctx, dy: Tensor, *_):
    x, y, places, gamma0, beta0, mean0, var0, count0, weight, bias, gamma, beta, mean, var, count = ctx.saved_tensors
    wants = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5, 6, 7, 8, 11)]
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{OP}: a gradient of a gradient was asked for, which it does not have: the residual is not kept; "
            'use convert(model, memory="default")'
        )
    mine = [*wants[:7], wants[7] and ctx.relu]  # without ReLU it is dy itself, and an operator may not return its input
    norms = (gamma0, beta0, mean0, var0, count0, weight, bias, gamma, beta, mean, var, count)
    dx, dgamma0, dbeta0, dw, db, dgamma, dbeta, dresidual = _gradient(dy, x, y, places, *norms, *ctx.settings, mine)
    return (
        common.like_input(dx, x) if wants[0] else None,
        dgamma0.to(gamma0.dtype) if wants[1] else None,
        dbeta0.to(beta0.dtype) if wants[2] else None,
        None,
        None,
        dw if wants[3] else None,
        db if wants[4] else None,
        dgamma.to(gamma.dtype) if wants[5] else None,
        dbeta.to(beta.dtype) if wants[6] else None,
        None,
        None,
        (dresidual if ctx.relu else dy).to(ctx.residual_dtype) if wants[7] else None,
        *(None,) * 14,
    )


_SETTINGS = (
    "bool before, bool training0, float eps0, str group0, bool training, float eps, bool relu, str group, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, int[] pool"
)
_forward = _library.compose(
    OP,
    "(Tensor x, Tensor? gamma0, Tensor? beta0, Tensor? mean0, Tensor? var0, Tensor weight, Tensor? bias, Tensor? gamma, "
    f"Tensor? beta, Tensor? mean, Tensor? var, Tensor? residual, {_SETTINGS}, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run,
    fake=_fake,
)
_gradient = _library.compose(
    f"{OP}_backward",
    "(Tensor dy, Tensor x, Tensor? y, Tensor places, Tensor? gamma0, Tensor? beta0, Tensor? mean0, Tensor? var0, "
    "Tensor count0, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, Tensor count, "
    f"{_SETTINGS}, bool[8] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
)
_library.autograd(OP, _setup, _backward)
_library.autocast(OP, ("x", "weight", "bias"), rounded_by_rooms=("weight", "bias"))
