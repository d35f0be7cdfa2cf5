"""residual_block in plain torch: the specification; and the same steps by any rooms of conv2d and bn_act."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fast.ops import common
from resnet_fast.ops.bn_act import eager as bn_act
from resnet_fast.ops.conv2d import eager as conv2d

F = torch.nn.functional
LINKS = 3  #: of the main path, at most
_ROOMS = {"bn_act": bn_act, "conv2d": conv2d}


class Link(NamedTuple):
    """A convolution without bias and the norm behind it."""

    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    @property
    def window(self) -> tuple[list[int], list[int], list[int], int]:
        """The convolution's settings, as conv2d's doors take them."""
        return self.stride, self.padding, self.dilation, self.groups


def unpack(tensors: tuple[Tensor | None, ...], eps: list[float], windows: list[int]) -> tuple[list[Link], Link | None]:
    """The main path and the projection, None where the shortcut is x itself.

    Args:
        tensors: weight, gamma and beta of three links and of the projection, None for those that are not there.
        eps, windows: of those that are; a window is stride, padding and dilation (two each) and groups.
    """
    links: list[Link | None] = []
    at = 0
    for i in range(0, 3 * (LINKS + 1), 3):
        if tensors[i] is None:
            links.append(None)
            continue
        w = list(windows[7 * at : 7 * at + 7])
        links.append(Link(*tensors[i : i + 3], eps[at], w[0:2], w[2:4], w[4:6], w[6]))
        at += 1
    return [link for link in links[:LINKS] if link is not None], links[LINKS]


def why_not(door: str, *args: object) -> str | None:
    """Eager always can."""
    return None


def eagerly(op: str, door: str, *args: Any) -> Any:
    """A door of the eager room."""
    return getattr(_ROOMS[op], door)(*args)


def fwd(
    x: Tensor,
    w0: Tensor,
    gamma0: Tensor | None,
    beta0: Tensor | None,
    w1: Tensor | None,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    w2: Tensor | None,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    wp: Tensor | None,
    gammap: Tensor | None,
    betap: Tensor | None,
    eps: list[float],
    windows: list[int],
    recompute: list[bool],
) -> tuple[Tensor, ...]:
    """y, the statistics (mean and biased variance of every link, the projection last), and the convolutions' outputs.

    Outputs that backward is to `recompute` are empty.
    """
    tensors = (w0, gamma0, beta0, w1, gamma1, beta1, w2, gamma2, beta2, wp, gammap, betap)
    return fwd_by(eagerly, x, *tensors, eps, windows, recompute)


def fwd_by(run: Callable[..., Any], x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """`fwd` by `run(op, door, *args)`."""
    *given, recompute = given
    links, projection = unpack(tuple(given[:-2]), *given[-2:])
    path = links if projection is None else [*links, projection]
    h, residual, outputs, statistics = x, x, [], []
    for link in path:
        main = link is not projection
        z = run("conv2d", "fwd", h if main else x, link.weight, None, *link.window)
        outputs.append(z)
        if main and link is links[-1]:
            statistics.append(())  # known when the shortcut is
            continue
        y, *found = run("bn_act", "fwd", z, link.gamma, link.beta, None, None, None, True, link.eps, main)
        statistics.append(found)
        h, residual = (y, residual) if main else (h, y)
    last, at = links[-1], len(links) - 1
    y, *statistics[at] = run(
        "bn_act", "fwd", outputs[at], last.gamma, last.beta, None, None, residual, True, last.eps, True
    )
    kept = [None if again else z for z, again in zip(outputs, recompute, strict=True)]
    return y, torch.cat([t for found in statistics for t in found]), *spread(kept, len(links), x)


def spread(outputs: list[Tensor | None], links: int, x: Tensor) -> list[Tensor]:
    """The convolutions' outputs in their places: three links, the projection; empty where there is none."""
    given = [*outputs[:links], *[None] * (LINKS - links), *(outputs[links:] or [None])]
    return [x.new_empty(0) if z is None else z for z in given]


def bwd(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    statistics: Tensor,
    z0: Tensor,
    z1: Tensor,
    z2: Tensor,
    zp: Tensor,
    w0: Tensor,
    gamma0: Tensor | None,
    beta0: Tensor | None,
    w1: Tensor | None,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    w2: Tensor | None,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    wp: Tensor | None,
    gammap: Tensor | None,
    betap: Tensor | None,
    eps: list[float],
    windows: list[int],
    recompute: list[bool],
    wants: list[bool],
) -> tuple[Tensor, ...]:
    """dx and the gradients of the twelve tensors, as far as wanted (empty where not)."""
    tensors = (w0, gamma0, beta0, w1, gamma1, beta1, w2, gamma2, beta2, wp, gammap, betap)
    given = (x, y, statistics, z0, z1, z2, zp, *tensors, eps, windows, recompute, wants)
    return bwd_by(eagerly, lambda *args: conv2d.dgrad_onto(*args), dy, *given)


def bwd_by(
    run: Callable[..., Any], onto: Callable[..., Tensor], dy: Tensor, x: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    """`bwd` by `run(op, door, *args)`, and `onto` as conv2d's dgrad_onto."""
    y, statistics, *rest, eps, windows, recompute, wants = given
    links, projection = unpack(tuple(rest[LINKS + 1 :]), eps, windows)
    count = len(links)
    path = links if projection is None else [*links, projection]
    outputs = [*rest[:count], *([] if projection is None else [rest[LINKS]])]
    places = [*range(count), *([] if projection is None else [LINKS])]
    found = iter(statistics.split([k for link in path for k in [link.weight.shape[0]] * 2]))
    statistics = [(mean, next(found)) for mean in found]
    grads: list[Tensor | None] = [None] * (1 + 3 * (LINKS + 1))

    def wanted(i: int) -> list[bool]:
        return list(wants[1 + 3 * places[i] : 4 + 3 * places[i]])

    def output(i: int, h: Tensor | None) -> Tensor:
        """z of a link that reads h: the one kept, or computed again."""
        return run("conv2d", "fwd", h, path[i].weight, None, *path[i].window) if recompute[i] else outputs[i]

    def norm(i: int, dout: Tensor, z: Tensor, mask: Tensor | None, relu: bool, residual: bool) -> tuple[Tensor, Tensor]:
        link = path[i]
        vectors = (link.gamma, link.beta, *statistics[i], True, link.eps, relu)
        given = (dout, z, mask, *vectors, [True, *wanted(i)[1:], residual])
        dz, *vectors, g = run("bn_act", "bwd", *given)
        for j, d in enumerate(vectors):
            grads[2 + 3 * places[i] + j] = d if wanted(i)[1 + j] else None
        return dz, g

    def weight(i: int, dz: Tensor, h: Callable[[], Tensor]) -> None:
        if wanted(i)[0]:
            dw = run("conv2d", "bwd", dz, h(), path[i].weight, False, *path[i].window, [False, True, False])[1]
            grads[1 + 3 * places[i]] = common.like_weight(dw, path[i].weight)

    def activation(i: int) -> Tensor:
        """What link i + 1 reads."""
        if i < 0:
            return x
        link = path[i]
        given = (outputs[i], link.gamma, link.beta, *statistics[i], None, False, link.eps, True)
        return run("bn_act", "fwd", *given)[0]

    def data(i: int, dz: Tensor, like: Tensor) -> Tensor:
        return run("conv2d", "bwd", dz, like, path[i].weight, False, *path[i].window, [True, False, False])[0]

    shortcut = wants[0] if projection is None else wants[0] or any(wanted(count))
    h = activation(count - 2) if recompute[count - 1] else None  # for its output and for its weight's gradient
    dz, g = norm(count - 1, dy, output(count - 1, h), y, True, shortcut)
    for i in range(count - 1, 0, -1):
        weight(i, dz, lambda i=i, h=h: activation(i - 1) if h is None else h)
        h = None
        if not wants[0] and not any(any(wanted(j)) for j in range(i)):
            break
        dz, _ = norm(i - 1, data(i, dz, outputs[i - 1]), outputs[i - 1], None, True, False)
    weight(0, dz, lambda: x)
    if projection is not None and shortcut:
        dzp, _ = norm(count, g, output(count, x), None, False, False)
        weight(count, dzp, lambda: x)
        g = data(count, dzp, x) if wants[0] else g
    if wants[0]:
        grads[0] = onto(dz, x, links[0].weight, *links[0].window, g)
    return tuple(x.new_empty(0) if d is None else d for d in grads)


def differentiable(x: Tensor, *given: Any) -> Tensor:
    """y as a graph autograd can differentiate twice."""
    links, projection = unpack(given[:-2], *given[-2:])

    def link(h: Tensor, one: Link) -> Tensor:
        z = F.conv2d(h, common.rounded(one.weight, h), None, *one.window)
        return F.batch_norm(z, None, None, one.gamma, one.beta, True, 0.0, one.eps)

    h = x
    for one in links[:-1]:
        h = torch.relu(link(h, one))
    return torch.relu(link(h, links[-1]) + (x if projection is None else link(x, projection)))
