"""The contract of residual_block: the unit of fusion and of memory in training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fast import _library, backends
from resnet_fast.ops import checks, common
from resnet_fast.ops.recomputed_conv_bn_act.op import Norm
from resnet_fast.ops.residual_block import eager, parts

OP = "residual_block"


class Link(NamedTuple):
    """A convolution without bias and the BatchNorm behind it."""

    weight: Tensor
    bn: Norm
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    recompute: bool = False  #: its convolution's output is computed again in backward instead of kept


def residual_block(x: Tensor, links: Sequence[Link], projection: Link | None = None) -> Tensor:
    """A residual block in training: convolutions and norms with ReLU between, the shortcut added, ReLU.

    Shape:
        x: (N, C, H, W) in any memory format, channels_last is native; one to three links, whose convolutions fit on each
        other; the shortcut is x itself or the projection of it, of the last convolution's shape, which is the output's,
        channels_last. Vectors of a link are (K,). Autocast casts x, as the shortcut too, and the filters (on CPUs the rooms
        round the latter).
    Maths:
        y = relu(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut), with shortcut = x or bn_p(conv_p(x)). Norms use their
        batch's statistics, and the running ones move, as in `bn_act`.
    Cost:
        The convolutions', and of every one's output z: written once, read for the statistics, read to be normalised.
        Saved for backward: x, y, every z and two vectors of each; what lies between links is computed again. The last link
        and the projection may `recompute` theirs: z is not kept, and backward computes that convolution once more.
    Raises:
        ValueError: not one to three links, a norm without its batch's statistics or over several processes, padding by name,
        one value per channel, an inner link that is to recompute. RuntimeError: shapes that do not fit together, several
        dtypes or devices.
    Source:
        He et al., Deep Residual Learning for Image Recognition, 2015; Rota Bulò et al., In-Place Activated BatchNorm, 2018;
        Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
    """
    path = [*links, *([] if projection is None else [projection])]
    if not 1 <= len(links) <= eager.LINKS:
        raise ValueError(f"{OP}: wanted one to three links, got {len(links)}")
    for link in path:
        _check_norm(x, link)
    if any(link.recompute for link in links[:-1]):
        raise ValueError(f"{OP}: wanted recompute of the last link or the projection only, got it of an inner link")
    windows = tuple((*map(_pair, link[2:5]), link.groups) for link in path)
    shapes = _shapes(x.shape, tuple(link.weight.shape for link in path), windows, projection is not None)
    _check_tensors(x, path)
    none: tuple[None, None, None] = (None, None, None)
    main = [(link.weight, *link.bn[2:4]) for link in links]
    tensors = [*main, *[none] * (eager.LINKS - len(main))]
    tensors.append(none if projection is None else (projection.weight, *projection.bn[2:4]))
    eps = [link.bn.eps for link in path]
    flat = [size for *pairs, groups in windows for size in (*(s for p in pairs for s in p), groups)]
    recompute = [link.recompute for link in path]
    y, statistics, *_ = _forward(x, *(t for three in tensors for t in three), eps, flat, recompute)
    norms = [link.bn for link in path]
    checks.update_running_each(norms, statistics, shapes)
    return y


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if type(value) is tuple and len(value) == 2 else common.pair("window", value)


def _check_norm(x: Tensor, link: Link) -> None:
    bn = link.bn
    if not bn.training or bn.group is not None:
        raise ValueError(
            f"{OP}: wanted norms with their batch's statistics, got training={bn.training}, group={bn.group}"
        )
    if isinstance(link.padding, str):
        raise ValueError(f'{OP}: wanted padding as numbers, got "{link.padding}"')
    checks.positive_eps(bn.eps, True, OP)
    checks.known_statistics(bn.running_mean, bn.running_var, True, OP)
    if bn.running_mean is not None and not isinstance(bn.momentum, (int, float)):
        raise TypeError(f"{OP}: wanted momentum as a number, got {bn.momentum!r} (a module turns None into an average)")


def _check_tensors(x: Tensor, path: list[Link]) -> None:
    common.check_floating(OP, "x", x)
    autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    for link in path:
        if link.weight.dtype != x.dtype and not autocast:
            raise RuntimeError(f"{OP}: wanted one dtype, got x of {x.dtype} and weight of {link.weight.dtype}")
        vectors = dict(zip(("running_mean", "running_var", "bn.weight", "bn.bias"), link.bn[:4]))
        for name, t in vectors.items():
            common.check_vector(OP, name, t, link.weight.shape[0])
        common.check_same_device(OP, x=x, weight=link.weight, **vectors)


@lru_cache(maxsize=4096)
def _known_shapes(x: tuple, filters: tuple, windows: tuple, projects: bool) -> tuple[tuple[int, int, int, int], ...]:
    """The shapes of the convolutions' outputs; checked once for given shapes."""
    found, h = [], torch.empty(x, device="meta")
    source = h
    for i, (shape, (stride, padding, dilation, groups)) in enumerate(zip(filters, windows)):
        last = projects and i == len(filters) - 1
        given, weight = source if last else h, torch.empty(shape, device="meta")
        common.convolution_arguments(OP, given, weight, None, stride, padding, dilation, groups)
        found.append(common.convolution_shape(given, weight, stride, padding, dilation))
        checks.several_values(found[-1])
        if not last:
            h = torch.empty(found[-1], device="meta")
    shortcut = found[-1] if projects else tuple(x)
    if tuple(h.shape) != tuple(shortcut):
        raise RuntimeError(f"{OP}: wanted a shortcut of the output's shape {tuple(h.shape)}, got {tuple(shortcut)}")
    return tuple(found)


def _shapes(x, filters, windows, projects):
    symbolic = torch.compiler.is_compiling() or any(isinstance(s, torch.SymInt) for s in x)
    return (_known_shapes.__wrapped__ if symbolic else _known_shapes)(x, filters, windows, projects)


def _run(x, *given):
    return backends.run_whole(OP, "fwd", lambda: parts.forward(x, *given), x, *given)


def _run_backward(dy, x, *given):
    return backends.run_whole(OP, "bwd", lambda: parts.backward(dy, x, *given), dy, x, *given)


def _fake(x, *given):
    *given, recompute = given
    links, projection = eager.unpack(given[:-2], *given[-2:])
    h, outputs = x, []
    for link in links:
        h = common.empty_convolution(h, link.weight, *link.window[:3])
        outputs.append(h)
    if projection is not None:
        outputs.append(common.empty_convolution(x, projection.weight, *projection.window[:3]))
    statistics = x.new_empty(2 * sum(z.shape[1] for z in outputs), dtype=checks.statistics_dtype(x))
    kept = [None if again else z for z, again in zip(outputs, recompute, strict=True)]
    return torch.empty_like(h), statistics, *eager.spread(kept, len(links), x)


def _fake_backward(dy, x, y, statistics, z0, z1, z2, zp, *given):
    *tensors, _, _, _, wants = given
    grads = [common.empty_output(x) if wants[0] else x.new_empty(0)]
    for t, want in zip(tensors, wants[1:], strict=True):
        vector = t is not None and t.dim() == 1
        like = torch.empty_like(t, dtype=checks.statistics_dtype(x) if vector else None) if want else x.new_empty(0)
        grads.append(like)
    return tuple(grads)


def _setup(ctx, inputs, output) -> None:
    x, *tensors, ctx.eps, ctx.windows, ctx.recompute = inputs
    y, *found = output
    ctx.save_for_backward(x, y, *found, *tensors)
    ctx.mark_non_differentiable(*found)


def _backward(ctx, dy: Tensor, *_):
    x, y, statistics, z0, z1, z2, zp, *tensors = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[: 1 + len(tensors)])
    inputs = (x, *tensors)
    if torch.is_grad_enabled():  # a graph of the gradient is wanted: torch's own operators are run again
        out = eager.differentiable(*inputs, ctx.eps, ctx.windows)
        found = iter(torch.autograd.grad(out, [t for t, w in zip(inputs, wants) if w], dy, create_graph=True))
        grads = [next(found) if want else None for want in wants]
    else:
        settings = (ctx.eps, ctx.windows, ctx.recompute)
        grads = _gradient(dy, x, y, statistics, z0, z1, z2, zp, *tensors, *settings, wants)
    dx = common.like_input(grads[0], x) if wants[0] else None
    rest = [
        None if not want else g if g.dtype is t.dtype else g.to(t.dtype)
        for g, t, want in zip(grads[1:], tensors, wants[1:])
    ]
    return dx, *rest, None, None, None


_TENSORS = "Tensor w0, Tensor? gamma0, Tensor? beta0, " + ", ".join(
    f"Tensor? w{i}, Tensor? gamma{i}, Tensor? beta{i}" for i in ("1", "2", "p")
)
_forward = _library.compose(
    OP,
    f"(Tensor x, {_TENSORS}, float[] eps, int[] windows, bool[] recompute) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run,
    fake=_fake,
)
_gradient = _library.compose(
    f"{OP}_backward",
    "(Tensor dy, Tensor x, Tensor y, Tensor statistics, Tensor z0, Tensor z1, Tensor z2, Tensor zp, "
    f"{_TENSORS}, float[] eps, int[] windows, bool[] recompute, bool[13] wants) -> ({', '.join(['Tensor'] * 13)})",
    run=_run_backward,
    fake=_fake_backward,
)
_library.autograd(OP, _setup, _backward)
_library.autocast(OP, ("x", "w0", "w1", "w2", "wp"), rounded_by_rooms=("w0", "w1", "w2", "wp"))
