"""bn_act_conv2d: the values and gradients of its two parts, and an activation less in memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from resnet_fast import exact, functional, use_backend
from resnet_fast.ops.bn_act_conv2d import eager
from resnet_fast.testing import check

BACKENDS = ("auto", "eager")


def inputs(c=5, k=7, h=9, w=6, groups=1, filter=3, dtype=torch.float32):
    return {
        "z": (torch.randn(3, c, h, w) * 2 + 1).to(dtype),
        "gamma": torch.rand(c) + 0.5,
        "beta": torch.randn(c),
        "weight": (torch.randn(k, c // groups, filter, filter) / (c * filter * filter) ** 0.5).to(dtype),
        "bias": torch.randn(k).to(dtype),
    }


def ours(z, gamma, beta, weight, bias, **settings):
    c = z.shape[1]
    return functional.bn_act_conv2d(
        z, z.new_zeros(c), z.new_ones(c), gamma, beta, weight, bias, training=True, **settings
    )


def plain(z, gamma, beta, weight, bias, stride=1, padding=0, dilation=1, groups=1):
    y = torch.relu(F.batch_norm(z, None, None, gamma, beta, True, 0.1, 1e-5))
    return F.conv2d(y, weight, bias, stride, padding, dilation, groups)


CASES = {
    "1x1": ({"filter": 1}, {}),
    "3x3": ({}, {"padding": 1}),
    "stride": ({"c": 16, "k": 32, "h": 11}, {"padding": 1, "stride": 2}),
    "groups": ({"c": 8, "k": 8, "groups": 4}, {"padding": 1, "groups": 4}),
    "dilation": ({"h": 13}, {"padding": 2, "dilation": 2}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_float64_is_the_plain_composition(case, backend):
    sizes, settings = CASES[case]

    def make():
        return {k: v.double() for k, v in inputs(**sizes).items()}

    with use_backend(backend):
        check.compare(partial(ours, **settings), partial(plain, **settings), make, list(make()))


@pytest.mark.parametrize("case", CASES)
def test_float32_by_the_law(case):
    """dz is bn_act's own, held to the law there: here a ReLU's kink lies inside, where one rounding may flip a sign."""
    sizes, settings = CASES[case]
    with exact():
        check.compare(
            lambda **k: ours(**k, **settings),
            lambda **k: plain(**k, **settings),
            lambda: inputs(**sizes),
            wants=("weight", "bias"),
        )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bits", [31, 1, 2, 4, 8, 16, 9, 22])
def test_the_specifications_backward(bits, training):
    """What rooms that run backward whole are held to is the gradient of the plain composition."""
    given = {k: v.double().requires_grad_() for k, v in inputs().items()}
    mean, var = (None, None) if training else (torch.randn(5).double(), torch.rand(5).double() + 0.5)
    y = torch.relu(F.batch_norm(given["z"], mean, var, given["gamma"], given["beta"], training, 0.1, 1e-5))
    out = F.conv2d(y, given["weight"], given["bias"], [2, 1], [1, 0], [1, 2])
    dout = torch.randn_like(out)
    want = dict(zip(given, torch.autograd.grad(out, list(given.values()), dout)))
    z, gamma, beta, weight, _ = (t.detach() for t in given.values())
    if training:
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
    wants = [bool(bits >> i & 1) for i in range(5)]
    got = eager.bwd(dout, z, gamma, beta, mean, var, weight, True, training, 1e-5, [2, 1], [1, 0], [1, 2], 1, wants)
    for name, a, wanted in zip(given, got, wants, strict=True):
        if wanted:
            torch.testing.assert_close(a, want[name])
        else:
            assert a.numel() == 0


def test_gradcheck_twice():
    given = {k: v.double().requires_grad_() for k, v in inputs(c=2, k=3, h=4, w=4).items()}
    assert torch.autograd.gradcheck(lambda *t: ours(*t, padding=1), tuple(given.values()))
    assert torch.autograd.gradgradcheck(lambda *t: ours(*t, padding=1), tuple(given.values()))


def test_evaluation_statistics_and_gradients():
    given = {k: v.double().requires_grad_() for k, v in inputs().items()}
    mean, var = torch.randn(5).double(), torch.rand(5).double() + 0.5
    out = functional.bn_act_conv2d(
        given["z"], mean, var, given["gamma"], given["beta"], given["weight"], given["bias"], training=False
    )
    y = torch.relu(F.batch_norm(given["z"], mean, var, given["gamma"], given["beta"], False))
    want = F.conv2d(y, given["weight"], given["bias"])
    torch.testing.assert_close(out, want)
    got = torch.autograd.grad(out.square().sum(), list(given.values()))
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), list(given.values())), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", [("weight",), ("z",), ("gamma", "bias"), ("beta", "weight", "z")])
def test_subsets_of_gradients(wanted):
    given = {k: v.double().requires_grad_(k in wanted) for k, v in inputs().items()}
    got = torch.autograd.grad(ours(**given).square().sum(), [given[k] for k in wanted])
    want = torch.autograd.grad(plain(**given).square().sum(), [given[k] for k in wanted])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_running_statistics_move():
    given, mean, var = inputs(), torch.zeros(5), torch.ones(5)
    want_mean, want_var = mean.clone(), var.clone()
    functional.bn_act_conv2d(given["z"], mean, var, None, None, given["weight"], training=True, momentum=0.3)
    F.batch_norm(given["z"], want_mean, want_var, training=True, momentum=0.3)
    torch.testing.assert_close(mean, want_mean)
    torch.testing.assert_close(var, want_var)


def test_keeps_no_activation():
    given = {k: v.requires_grad_() for k, v in inputs(c=16, h=32, w=32).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(**given, padding=1)
    maps = {t.data_ptr() for t in kept if t.dim() == 4 and t.shape[2:] == (32, 32)}
    assert maps == {given["z"].data_ptr()}


def test_opcheck():
    given = inputs()
    args = (given["z"], given["gamma"], given["beta"], None, None, given["weight"], given["bias"])
    args = tuple(a.requires_grad_() if a is not None else None for a in args)
    op = torch.ops.resnet_fast.bn_act_conv2d.default
    torch.library.opcheck(op, (*args, True, 1e-5, [1, 1], [1, 1], [1, 1], 1, ""))


def test_autocast_keeps_statistics_float32():
    given, mean, var = inputs(), torch.zeros(5), torch.ones(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = functional.bn_act_conv2d(given["z"], mean, var, given["gamma"], None, given["weight"], training=True)
    assert out.dtype == torch.bfloat16 and mean.dtype == torch.float32


def test_bad_input():
    given = inputs()
    with pytest.raises(ValueError, match="numbers"):
        ours(**given, padding="same")
    with pytest.raises(RuntimeError, match="bn_act_conv2d"):
        ours(**(given | {"weight": torch.randn(7, 4, 3, 3)}))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours(**(given | {"z": torch.randn(1, 5, 1, 1), "weight": torch.randn(7, 5, 1, 1)}))
