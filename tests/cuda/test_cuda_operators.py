"""The public operators through the chooser with the cuda backend: values and gradients, kernels executed."""

from __future__ import annotations

import pytest
import torch
from cuda_law import DTYPES, assert_lawful, images, vectors

import resnet_fast.functional as F
from resnet_fast import backends
from resnet_fast.ops import cuda_room


@pytest.fixture
def pretend(card, monkeypatch):
    """CPU tensors pass for the card's: everything else the rooms ask of tensors stays asked."""

    def why_not(*tensors, vectors=()):
        return cuda_room.shape_why_not([t for t in tensors if t is not None], [v for v in vectors if v is not None])

    monkeypatch.setattr(cuda_room, "why_not", why_not)
    return card


def gradients(function, tensors, backend, double=False):
    leaves = [t.detach().double() if double else t.detach().clone() for t in tensors]
    leaves = [t.requires_grad_() for t in leaves]
    with backends.use_backend(backend):
        y = function(*leaves)
        dy = torch.cos(torch.arange(y.numel(), dtype=torch.float32)).view_as(y).to(y.dtype)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)


def compare(card, function, tensors, size=0.0):
    got = card.run(gradients, function, tensors, "cuda")
    spec, exact = gradients(function, tensors, "eager"), gradients(function, tensors, "eager", double=True)
    for i, (g, s, e) in enumerate(zip(got, spec, exact)):
        assert_lawful(g, s, e, f"result {i}", size=size if g.dim() == 1 else float(e.abs().max()))
        assert g.stride() == s.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu(pretend, dtype):
    compare(pretend, F.add_relu, [images(2, 24, 5, 7, dtype, seed=1), images(2, 24, 5, 7, dtype, seed=2)])
    assert pretend.names() == ["add_relu_forward", "add_relu_gradient"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_bn_act(pretend, residual, training):
    gamma, beta = vectors(16, 3)
    running = torch.randn(16), torch.rand(16) + 0.5
    kept = [t.clone() for t in running]

    def function(x, gamma, beta, r=None):
        statistics = [t.clone().to(gamma.dtype) for t in running]
        return F.bn_act(x, *statistics, gamma, beta, r, training)

    tensors = [images(2, 16, 9, 7, seed=4, shift=0.5), gamma, beta]
    compare(pretend, function, tensors + [images(2, 16, 9, 7, seed=5)] * residual, size=8.0)
    assert all(torch.equal(a, b) for a, b in zip(running, kept))
    forward = ["bn_single_pass"] if training else ["bn_apply"]
    assert pretend.names() == [*forward, "bn_backward_reduce", "bn_backward_finish", "bn_backward_apply"]


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_max_pool2d(pretend, layout):
    x = images(2, 8, 10, 9, seed=6)
    x = x if layout == "channels_last" else x.contiguous()
    compare(pretend, lambda t: F.max_pool2d(t, 3, 2, 1), [x])
    assert pretend.names() == ["max_pool_forward", "max_pool_gradient"]


def test_running_statistics_move(pretend):
    x, mean, var = images(2, 16, 9, 7, seed=7), torch.zeros(16), torch.ones(16)

    def forward():
        with backends.use_backend("cuda"):
            return F.bn_act(x, mean, var, None, None, None, True, 0.1)

    pretend.run(forward)
    wanted = torch.nn.BatchNorm2d(16, affine=False).train()
    wanted(x)
    torch.testing.assert_close(mean, wanted.running_mean)
    torch.testing.assert_close(var, wanted.running_var)


def test_a_cpu_tensor_is_refused_by_name():
    with (
        backends.use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"cannot run add_relu.fwd: the cuda room wants CUDA"),
    ):
        F.add_relu(torch.ones(2, 2), torch.ones(2, 2))


def test_a_dtype_is_refused_by_name(pretend):
    with (
        backends.use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"takes float32, bfloat16 and float16, got torch.float64"),
    ):
        F.add_relu(torch.ones(2, 2).double(), torch.ones(2, 2).double())
