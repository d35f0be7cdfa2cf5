"""bn_act_max_pool2d by the CUDA kernels, executed: values, places that hold them, gradients, bytes; and bn_act's parts."""

from __future__ import annotations

import pytest
import torch
from cuda_law import DTYPES, assert_lawful, images, vectors
from test_cuda_max_pool2d import STEM, WINDOWS, call_of

from resnet_fast.ops.bn_act import cuda as norm
from resnet_fast.ops.bn_act import eager as norm_eager
from resnet_fast.ops.bn_act_max_pool2d import cuda as room
from resnet_fast.ops.bn_act_max_pool2d import eager


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def check(card, x, window, training, seed=7, wants=(True, True, True)):
    gamma, beta = vectors(x.shape[1], seed)
    if training:
        mean, var = norm_eager.statistics(x)
    else:
        mean, var = torch.randn(x.shape[1]), torch.rand(x.shape[1]) + 0.1
    given, call = (gamma, beta, mean, var), call_of(x, window)
    y, places = card.run(room.fwd, x, *given, 1e-5, *call, True)
    assert card.names() == ["max_pool_forward"]
    spec, exact = eager.fwd(x, *given, 1e-5, *call, True)[0], eager.fwd(*double(x, *given), 1e-5, *call, True)[0]
    assert_lawful(y, spec, exact, "y", size=float(exact.abs().max()))
    assert torch.equal(places == 255, y <= 0) and places.stride() == y.stride()
    at = eager.unpooled(torch.ones_like(exact), places, *x.shape[2:], *call[:4])
    whole = norm_eager.fwd(*double(x, *given), None, False, 1e-5, True)[0]
    slack = float(exact.sum()) * 2 * torch.finfo(x.dtype).eps
    assert at.sum() == (places != 255).sum() and abs(float((whole * at).sum() - exact.sum())) <= slack
    dy = images(*y.shape, x.dtype, seed=seed + 1)
    back = (*call[:4], list(wants))
    grads = card.run(room.bwd, dy, places, x, *given, training, 1e-5, *back)
    spec = eager.bwd(dy, places, x, *given, training, 1e-5, *back)
    exact = eager.bwd(dy.double(), places, *double(x, *given), training, 1e-5, *back)
    for what, g, s, e, wanted in zip(("dx", "dgamma", "dbeta"), grads, spec, exact, wants):
        assert (g.numel() > 0) == wanted, what
        if wanted:
            size = float(e.abs().max()) * (8 if g.dim() == 1 else 1)
            assert_lawful(g, s.to(g.dtype), e, what, size=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 9, 11), (1, 3, 7, 8), (1, 320, 5, 6)], ids=str)
def test_values_places_and_gradients(card, shape, dtype):
    x = images(*shape, dtype, scale=2.0, shift=0.5, seed=6)
    for window in (STEM, WINDOWS[3]):
        for training in (False, True):
            check(card, x, window, training)


@pytest.mark.parametrize("wants", [(False, True, True), (True, False, False), (False, False, True)])
def test_what_is_not_wanted_is_empty(card, wants):
    check(card, images(2, 16, 7, 8, scale=2.0, seed=3), STEM, True, wants=wants)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_the_floor(card, dtype):
    """The activation between norm and pool never reaches memory."""
    x = images(2, 64, 14, 14, dtype, seed=9)
    mean, var, call = torch.zeros(64), torch.ones(64), call_of(x, STEM)
    size = x.numel() * x.element_size()
    y, places = card.run(room.fwd, x, None, None, mean, var, 1e-5, *call, True)
    out = y.numel() * y.element_size()
    assert card.bytes == (size + 2 * 64 * 4, out + places.numel())
    card.run(room.fwd, x, None, None, mean, var, 1e-5, *call, False)
    assert card.bytes == (size + 2 * 64 * 4, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 7, 9), (1, 3, 5, 5), (2, 127, 5, 5)], ids=str)
def test_statistics_alone(card, shape, dtype):
    x = images(*shape, dtype, scale=1.5, shift=30.0, seed=2)
    mean, var = card.run(norm.statistics, x)
    assert card.names() == ["bn_statistics", "bn_finish"]
    exact = norm_eager.statistics(x.double())
    assert_lawful(mean, norm_eager.statistics(x)[0], exact[0], "mean", size=float(x.abs().max()))
    assert ((var.double() - exact[1]).abs() <= 1e-5 * exact[1]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_dx_of_sums_over_several_processes(card, masked, dtype):
    x, dy = images(2, 24, 7, 5, dtype, seed=4), images(2, 24, 7, 5, dtype, seed=5)
    gamma, beta = vectors(24, 6)
    mean, var, count = torch.randn(24) * 0.1, torch.rand(24) + 0.5, torch.tensor([333.0], dtype=torch.float64)
    dgamma, dbeta = torch.randn(24) * 9, torch.randn(24) * 9
    given = (dy, x, None, gamma, beta, mean, var, dgamma, dbeta, count, 1e-5, masked)
    dx = card.run(norm.dx, *given)
    assert card.names() == ["bn_backward_apply"], "the sums are given, nothing is reduced"
    exact = norm_eager.dx(*(t.double() if isinstance(t, torch.Tensor) else t for t in given))
    assert_lawful(dx, norm_eager.dx(*given), exact, "dx", size=float(exact.abs().max()))
