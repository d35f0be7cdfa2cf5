"""recomputed_conv_bn_act: values and gradients of its parts, and a convolution's output less in memory."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from resnet_fast import exact, functional, use_backend
from resnet_fast.ops.recomputed_conv_bn_act.op import Norm, Pool
from resnet_fast.testing import check

BACKENDS = ("auto", "eager")
CASES = {  # filter, window, and what stands before and behind
    "1x1, before, residual": (1, {}, {"before": True, "residual": True}),
    "1x1, residual": (1, {}, {"residual": True}),
    "3x3, no ReLU": (3, {"padding": 1}, {"act": None, "before": True}),
    "no ReLU, residual": (1, {}, {"act": None, "residual": True}),
    "stem": (3, {"padding": 1, "stride": 2}, {"pool": True}),
    "deep stem": (3, {"padding": 1}, {"pool": True, "before": True}),
    "evaluation": (1, {}, {"before": True, "residual": True, "training": False}),
    "evaluation, pooled": (3, {"padding": 1}, {"pool": True, "training": False}),
}


def inputs(case, dtype=torch.float32):
    filter, window, parts = CASES[case]
    x = torch.randn(3, 5, 11, 8).to(dtype)
    weight = (torch.randn(7, 5, filter, filter) / (5 * filter * filter) ** 0.5).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    found = {
        "x": x,
        "weight": weight,
        "bias": torch.randn(7).to(dtype),
        "gamma": (torch.rand(7) + 0.5).to(wide),
        "beta": torch.randn(7).to(wide),
    }
    if parts.get("residual"):
        size = F.conv2d(x, weight, **window).shape
        found["residual"] = torch.randn(size).to(dtype)
    if parts.get("before"):
        found |= {"gamma0": (torch.rand(5) + 0.5).to(wide), "beta0": torch.randn(5).to(wide)}
    return found


def statistics(t, c, training):
    """Running ones: a fixed draw, as ours and plain get the same."""
    wide = torch.promote_types(t.dtype, torch.float32)
    return [torch.linspace(-0.5, 0.5, c).to(wide), torch.linspace(0.5, 1.5, c).to(wide)]


def ours(case, x, weight, bias, gamma, beta, residual=None, gamma0=None, beta0=None):
    _, window, parts = CASES[case]
    training = parts.get("training", True)
    norm = Norm(*statistics(x, 7, training), gamma, beta, training, 0.1, 1e-5)
    before = Norm(*statistics(x, 5, training), gamma0, beta0, training, 0.1, 1e-5) if parts.get("before") else None
    pool = Pool(3, 2, 1) if parts.get("pool") else None
    act = parts.get("act", "relu")
    return functional.recomputed_conv_bn_act(x, weight, bias, norm, residual, act, before=before, pool=pool, **window)


def plain(case, x, weight, bias, gamma, beta, residual=None, gamma0=None, beta0=None, sign=False):
    _, window, parts = CASES[case]
    training = parts.get("training", True)
    if parts.get("before"):
        x = torch.relu(F.batch_norm(x, *statistics(x, 5, training), gamma0, beta0, training))
    y = F.batch_norm(F.conv2d(x, weight, bias, **window), *statistics(x, 7, training), gamma, beta, training)
    y = y if residual is None else y + residual
    y = torch.relu(y) if parts.get("act", "relu") and not sign else y
    return F.max_pool2d(y, 3, 2, 1) if parts.get("pool") else y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_float64_is_the_plain_composition(case, backend):
    make = partial(inputs, case, torch.float64)
    with use_backend(backend):
        check.compare(partial(ours, case), partial(plain, case), make, list(make()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_by_the_law(case, dtype):
    """Gradients beyond the last norm's own: `before` has a kink inside, where one rounding may flip a sign."""
    wants = ("gamma", "beta") if dtype == torch.float32 else ()
    with exact():
        check.compare(
            lambda **k: ours(case, **k),
            lambda **k: plain(case, **k),
            lambda: inputs(case, dtype),
            wants=wants,
            kink=(lambda **k: plain(case, sign=True, **k)) if CASES[case][2].get("act", "relu") else None,
        )


@pytest.mark.parametrize("case", ["1x1, before, residual", "stem"])
def test_the_bits_of_what_keeps_the_output(case):
    """Computing again gives what was: outputs and gradients are those of the operators that keep everything."""
    given = {k: v.requires_grad_() for k, v in inputs(case).items()}
    _, window, parts = CASES[case]
    x = given["x"]
    out = ours(case, **given)
    last = (given["gamma"], given["beta"])
    if parts.get("before"):
        first = (*statistics(x, 5, True), given["gamma0"], given["beta0"])
        z = functional.bn_act_conv2d(x, *first, given["weight"], given["bias"], training=True, **window)
        want = functional.bn_act(z, *statistics(x, 7, True), *last, given["residual"], training=True)
    else:
        z = functional.conv2d(x, given["weight"], given["bias"], **window)
        want = functional.bn_act_max_pool2d(z, *statistics(x, 7, True), *last, 3, 2, 1, training=True)
    assert torch.equal(out, want)
    leaves = list(given.values())
    grads = torch.autograd.grad(out.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("case", ["1x1, before, residual", "stem"])
def test_subsets_of_gradients(case):
    names = list(inputs(case))
    values = inputs(case, torch.float64)
    every = {k: v.clone().requires_grad_() for k, v in values.items()}
    want = dict(zip(names, torch.autograd.grad(ours(case, **every).square().sum(), list(every.values())), strict=True))
    for size in (1, 2):
        for some in itertools.combinations(names, size):
            given = {k: v.clone().requires_grad_(k in some) for k, v in values.items()}
            got = torch.autograd.grad(ours(case, **given).square().sum(), [given[k] for k in some])
            for name, a in zip(some, got, strict=True):
                assert torch.equal(a, want[name]), f"{some}: {name}"
    assert not ours(case, **values).requires_grad


def test_gradcheck():
    given = {k: v.requires_grad_() for k, v in inputs("1x1, before, residual", torch.float64).items()}
    small = {
        k: v[..., :3, :3].detach().clone().requires_grad_() if v.shape[2:] == (11, 8) else v for k, v in given.items()
    }
    names = list(small)
    assert torch.autograd.gradcheck(
        lambda *t: ours("1x1, before, residual", **dict(zip(names, t, strict=True))), tuple(small.values())
    )


@pytest.mark.parametrize("case", ["1x1, before, residual", "stem"])
def test_keeps_no_convolution_output(case):
    given = {k: v.requires_grad_() for k, v in inputs(case).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ours(case, **given)
    maps = {t.data_ptr() for t in kept if t.dim() == 4 and t.is_floating_point()}
    allowed = {given["x"].data_ptr(), given["weight"].data_ptr(), y.data_ptr()}
    assert given["x"].data_ptr() in maps and maps <= allowed


def test_running_statistics_move():
    given = inputs("1x1, before, residual")
    mine = [torch.zeros(7), torch.ones(7), torch.zeros(5), torch.ones(5)]
    norms = [Norm(*mine[i : i + 2], None, None, True, 0.3, 1e-5) for i in (0, 2)]
    functional.recomputed_conv_bn_act(given["x"], given["weight"], given["bias"], norms[0], before=norms[1])
    want = [torch.zeros(7), torch.ones(7), torch.zeros(5), torch.ones(5)]
    a = torch.relu(F.batch_norm(given["x"], *want[2:], training=True, momentum=0.3))
    F.batch_norm(F.conv2d(a, given["weight"], given["bias"]), *want[:2], training=True, momentum=0.3)
    torch.testing.assert_close(mine, want)


@pytest.mark.parametrize("case", ["1x1, before, residual", "stem"])
def test_opcheck_and_compile(case):
    given = {k: v.requires_grad_() for k, v in inputs(case).items()}
    calls = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.resnet_fast.recomputed_conv_bn_act:
                calls.append(args)
            return function(*args, **(kwargs or {}))

    with use_backend("eager"):
        with Spy():
            want = torch.autograd.grad(ours(case, **given).square().sum(), list(given.values()))
        args = [
            a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) and a.requires_grad else a
            for a in calls[0]
        ]
        torch.library.opcheck(torch.ops.resnet_fast.recomputed_conv_bn_act.default, tuple(args))
        torch._dynamo.reset()
        compiled = torch.compile(lambda **k: ours(case, **k), fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(**given).square().sum(), list(given.values()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast_keeps_statistics_float32():
    given = inputs("1x1, before, residual")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours("1x1, before, residual", **(given | {"residual": given["residual"].bfloat16()}))
    assert out.dtype == torch.bfloat16


def test_refusals():
    given = {k: v.requires_grad_() for k, v in inputs("1x1, before, residual").items()}
    norm = Norm(torch.zeros(7), torch.ones(7), None, None, True, 0.1, 1e-5)
    x, w = given["x"], given["weight"]
    with pytest.raises(ValueError, match="padding as numbers"):
        functional.recomputed_conv_bn_act(x, w, None, norm, padding="same")
    with pytest.raises(ValueError, match="before a pool"):
        functional.recomputed_conv_bn_act(x, w, None, norm, act=None, pool=Pool(2))
    with pytest.raises(RuntimeError, match=r"\(7,\)"):
        functional.recomputed_conv_bn_act(x, w, None, norm._replace(weight=torch.ones(5)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        functional.recomputed_conv_bn_act(x[:1, :, :1, :1], w, None, norm)
    with pytest.raises(RuntimeError, match="residual of the output's shape"):
        functional.recomputed_conv_bn_act(x, w, None, norm, given["residual"][:1])
    out = ours("1x1, before, residual", **given)
    with pytest.raises(RuntimeError, match="gradient of a gradient"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
