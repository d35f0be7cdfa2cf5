"""From modules to operators: what a block's forward says, with torch's own modules keeping the state.

A fused call reads the parameters of plain `Conv2d` and `BatchNorm2d` modules and bypasses their `forward`. Whatever
makes that a different computation (hooks, subclasses, parametrizations, SyncBatchNorm, padding modes) is seen at the
call, and the modules themselves are run then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.fx import Proxy
from torch.nn.modules import module as global_hooks

from resnet_fast import backends, functional
from resnet_fast.ops.conv2d.op import with_input
from resnet_fast.ops.recomputed_conv_bn_act.op import Norm, Pool
from resnet_fast.ops.residual_block.op import Link


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a module must be run by its own `forward`, None when reading its parameters is the same."""
    if type(module) is not kind:
        return f"{type(module).__name__} is not a plain {kind.__name__}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"the {kind.__name__} has hooks, which must run"
    return None


def why_not_norm(bn: nn.Module) -> str | None:
    """Why a norm must be run by its own `forward`, None when it is a BatchNorm2d or SyncBatchNorm to be fused."""
    return why_not_plain(bn, nn.SyncBatchNorm if type(bn) is nn.SyncBatchNorm else nn.BatchNorm2d)


def why_not_fused(conv: nn.Module | None, bn: nn.Module) -> str | None:
    """Why a convolution and its BatchNorm cannot be fused, None when they can."""
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return "global module hooks are registered, which must run"
    if conv is not None:
        reason = why_not_plain(conv, nn.Conv2d)
        if reason is not None:
            return reason
        if conv.padding_mode != "zeros":
            return f"padding_mode {conv.padding_mode!r} is not fused"
    return why_not_norm(bn)


def conv_bn_act(
    x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, residual: Tensor | None = None, act: str | None = "relu"
) -> Tensor:
    """act(bn(conv(x)) + residual), moving bn's running statistics as `bn` itself would."""
    if isinstance(x, Proxy) or why_not_fused(conv, bn) is not None:
        return _unfused(bn(conv(x)), residual, act)
    mean, var, training, momentum = _statistics(bn)
    return functional.conv_bn_act(
        x, conv.weight, conv.bias, mean, var, bn.weight, bn.bias, residual,
        training, momentum, bn.eps, act, conv.stride, conv.padding, conv.dilation, conv.groups, _group(bn),
    )  # fmt: skip


#: With memory "lean" a convolution at the end of a block, its projection or the stem is computed again in backward where
#: an output value takes at most so many multiplications and additions: 1x1 convolutions and the stem. A 3x3 one takes 576
#: and more: too much time for its bytes.
RECOMPUTE_DEPTH = 512

Links = Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]]
#: What a block adds to its main path: a tensor, or what is made of the block's input.
Shortcut = Tensor | Callable[[Tensor], Tensor] | None


def recomputes(conv: nn.Module) -> bool:
    """Whether `memory="lean"` computes this convolution again in backward, as the end of a block, projection or stem."""
    return type(conv) is nn.Conv2d and conv.weight[0].numel() <= RECOMPUTE_DEPTH


def chain(
    x: Tensor,
    links: Links,
    shortcut: Shortcut = None,
    act: str | None = "relu",
    lean: bool = False,
    pool: nn.AdaptiveAvgPool2d | None = None,
) -> Tensor:
    """A block's main path: every link a convolution and its norm, ReLU between links; act(... + shortcut) at the end.

    With gradients the activations between the links are not kept but computed again in backward, with `lean` also the
    last convolution's output where that `recomputes`. With `pool` (to one pixel) the mean of that end, which then is
    neither written nor kept where the block has gradients.
    """
    again = lean and recomputes(links[-1][0])
    if pool is not None and (again or act != "relu" or why_not_end(pool) or not torch.is_grad_enabled()):
        return pool(chain(x, links, shortcut, act, lean))
    plain = isinstance(x, Proxy) or any(why_not_fused(conv, bn) or isinstance(conv.padding, str) for conv, bn in links)
    again = again and not plain
    if plain or not torch.is_grad_enabled() or (len(links) == 1 and not again):
        residual = shortcut(x) if callable(shortcut) else shortcut
        for conv, bn in links[:-1]:
            x = conv_bn_act(x, conv, bn)
        x = conv_bn_act(x, *links[-1], residual, act)
        return x if pool is None else pool(x)
    if again:
        return _recomputed(x, links, shortcut, act)
    z, bn, residual = _inner(x, links, shortcut)
    if pool is not None:
        mean, var, training, momentum = _statistics(bn)
        norm = (mean, var, bn.weight, bn.bias)
        return functional.bn_act_global_avg_pool2d(z, *norm, residual, training, momentum, bn.eps, _group(bn))
    return bn_act(z, bn, residual, act)


def block(
    x: Tensor,
    links: Links,
    projection: tuple[nn.Conv2d, nn.BatchNorm2d] | None = None,
    lean: bool = False,
    pool: nn.AdaptiveAvgPool2d | None = None,
) -> Tensor:
    """A residual block: relu(main path + shortcut), the shortcut x itself or its projection; pooled where a pool is given.

    In training on a CPU one operator; else, and with whatever that does not take, a `chain` of them.
    """
    path = links if projection is None else [*links, projection]
    pools = pool is not None and not (lean and recomputes(links[-1][0]))  # what is written anyway is pooled behind it
    if not pools and _is_whole(x, path) and (projection is not None or not _is_cast(x)):
        again = [lean and i >= len(links) - 1 and recomputes(conv) for i, (conv, _) in enumerate(path)]
        whole = [
            Link(conv.weight, _norm(bn), conv.stride, conv.padding, conv.dilation, conv.groups, recompute)
            for (conv, bn), recompute in zip(path, again)
        ]
        last = None if projection is None else whole.pop()
        y = functional.residual_block(x, whole, last)
        return y if pool is None else pool(y)

    def shortcut(x: Tensor) -> Tensor:
        if projection is None:
            return x
        if lean and torch.is_grad_enabled() and recomputes(projection[0]) and not _why_not_recomputed(*projection):
            return _recomputed(x, [projection], None, None)
        return conv_bn_act(x, *projection, act=None)

    return chain(x, links, shortcut, lean=lean, pool=pool)


def _why_not_recomputed(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> str | None:
    return why_not_fused(conv, bn) or ("padding by name is not fused" if isinstance(conv.padding, str) else None)


def _is_whole(x: Tensor, path: Links) -> bool:
    """Whether `functional.residual_block` takes these, and is the better way.

    Rooms of other backends have kernels across the links of a chain instead; torch.compile keeps to the chain too.
    """
    if isinstance(x, Proxy) or x.device.type != "cpu" or x.dim() != 4 or not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or backends.forced() not in (None, "cpu", "eager"):
        return False
    for conv, bn in path:
        if why_not_fused(conv, bn) is not None or isinstance(conv.padding, str) or conv.bias is not None:
            return False
        if not bn.training or not bn.eps > 0 or _group(bn) is not None:
            return False
    return len(path) > 1


def _is_cast(x: Tensor) -> bool:
    """Whether autocast gives convolutions another x than the one it is: the shortcut keeps its dtype, and the output's."""
    return torch.is_autocast_enabled("cpu") and x.dtype not in (torch.get_autocast_dtype("cpu"), torch.float64)


def _inner(x: Tensor, links: Links, shortcut: Shortcut = None) -> tuple[Tensor, nn.BatchNorm2d, Tensor | None]:
    """The last link's convolution output, the norm that follows, and the residual to be added behind it.

    A shortcut of x gets x by way of the first convolution, which then joins the gradients of both.
    """
    conv, bn = links[0]
    given = (x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    with backends.normalised_next(bn.training):
        if shortcut is x or callable(shortcut):
            z, again = with_input(*given)
        else:
            z, again = functional.conv2d(*given), None
    residual = shortcut(again) if callable(shortcut) else shortcut if again is None else again
    for conv, following in links[1:]:
        mean, var, training, momentum = _statistics(bn)
        with backends.normalised_next(following.training):
            z = functional.bn_act_conv2d(
                z, mean, var, bn.weight, bn.bias, conv.weight, conv.bias, training, momentum, bn.eps,
                conv.stride, conv.padding, conv.dilation, conv.groups, _group(bn),
            )  # fmt: skip
        bn = following
    return z, bn, residual


def _recomputed(
    x: Tensor, links: Links, shortcut: Shortcut, act: str | None, pool: nn.MaxPool2d | None = None
) -> Tensor:
    """The chain whose last convolution is computed again in backward, and the pool behind it."""
    before = None
    if len(links) > 1:
        x, bn, residual = _inner(x, links[:-1], shortcut)
        before = _norm(bn)
    else:
        residual = shortcut(x) if callable(shortcut) else shortcut
    conv, bn = links[-1]
    window = None
    if pool is not None:
        window = Pool(pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    return functional.recomputed_conv_bn_act(
        x, conv.weight, conv.bias, _norm(bn), residual, act, conv.stride, conv.padding, conv.dilation, conv.groups,
        before, window,
    )  # fmt: skip


def _norm(bn: nn.BatchNorm2d) -> Norm:
    mean, var, training, momentum = _statistics(bn)
    return Norm(mean, var, bn.weight, bn.bias, training, momentum, bn.eps, _group(bn))


def bn_act(x: Tensor, bn: nn.BatchNorm2d, residual: Tensor | None = None, act: str | None = "relu") -> Tensor:
    """act(bn(x) + residual), moving bn's running statistics as `bn` itself would."""
    if isinstance(x, Proxy) or why_not_fused(None, bn) is not None:
        return _unfused(bn(x), residual, act)
    mean, var, training, momentum = _statistics(bn)
    return functional.bn_act(x, mean, var, bn.weight, bn.bias, residual, training, momentum, bn.eps, act, _group(bn))


def stem(x: Tensor, links: Links, pool: nn.MaxPool2d, lean: bool = False) -> Tensor:
    """pool(relu(bn(conv(x)))), perhaps behind other links; the normalised map before the pool is not written.

    With `lean` the last convolution's output is computed again in backward where that `recomputes`.
    """
    if isinstance(x, Proxy) or x.dim() != 4 or why_not_stem(links, pool) is not None:
        return max_pool(chain(x, links), pool)
    if not torch.is_grad_enabled():
        x = chain(x, links[:-1]) if len(links) > 1 else x
        return _recomputed(x, links[-1:], None, "relu", pool)
    if lean and recomputes(links[-1][0]):
        return _recomputed(x, links, None, "relu", pool)
    z, bn, _ = _inner(x, links)
    mean, var, training, momentum = _statistics(bn)
    return functional.bn_act_max_pool2d(
        z, mean, var, bn.weight, bn.bias, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode,
        training, momentum, bn.eps, _group(bn),
    )  # fmt: skip


def why_not_stem(links: Links, pool: nn.Module) -> str | None:
    """Why convolutions with norms and ReLUs and a pool behind them cannot be fused, None when they can."""
    reasons = [why_not_fused(conv, bn) for conv, bn in links]
    reasons += ["padding by name is not fused" for conv, _ in links if isinstance(conv.padding, str)]
    return next((r for r in reasons if r is not None), None) or why_not_pool(pool)


def why_not_pool(pool: nn.Module) -> str | None:
    """Why a max pool cannot be fused with what is before it, None when it can."""
    reason = why_not_plain(pool, nn.MaxPool2d)
    if reason is not None:
        return reason
    if pool.return_indices:
        return "the pool returns indices"
    kernel = pool.kernel_size if isinstance(pool.kernel_size, tuple) else (pool.kernel_size,) * 2
    return "the pool's window has more than 254 places" if kernel[0] * kernel[-1] > 254 else None


def why_not_end(pool: nn.Module) -> str | None:
    """Why an average pool cannot be fused with the end of a block, None when it is the mean over each image."""
    reason = why_not_plain(pool, nn.AdaptiveAvgPool2d)
    if reason is None and pool.output_size not in (1, (1, 1), [1, 1]):
        reason = f"the pool's output is {pool.output_size}, not one pixel"
    return reason


def max_pool(x: Tensor, pool: nn.MaxPool2d) -> Tensor:
    """pool(x), with one byte per output kept for backward."""
    if isinstance(x, Proxy) or why_not_plain(pool, nn.MaxPool2d) is not None or pool.return_indices or x.dim() != 4:
        return pool(x)
    return functional.max_pool2d(x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)


def _unfused(y: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
    if residual is not None:
        y = y + residual
    return torch.relu(y) if act == "relu" else y


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _statistics(bn: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None, bool, float]:
    """Running mean and variance, whether the batch's are used, and the momentum: torch's rules, counter included."""
    momentum = 0.0 if bn.momentum is None else bn.momentum
    mean, var, count = (bn._buffers[name] if name in bn._buffers else getattr(bn, name) for name in _STATISTICS)
    tracking = bn.training and bn.track_running_stats
    if tracking and count is not None:
        count.add_(1)
        if bn.momentum is None:  # cumulative average
            momentum = 1.0 / float(count)
    training = bn.training or (mean is None and var is None)
    if bn.training and not bn.track_running_stats:
        return None, None, training, momentum
    return mean, var, training, momentum


def _group(bn: nn.BatchNorm2d) -> distributed.ProcessGroup | None:
    """The processes whose batches make the statistics: those of a SyncBatchNorm in training, where there are several."""
    if type(bn) is not nn.SyncBatchNorm or not bn.training:
        return None
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    group = bn.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None
