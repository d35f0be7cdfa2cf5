"""On a machine with a card: the rooms against eager and float64, streams, graphs, devices. Run by `make gpu`."""

from __future__ import annotations

import pytest
import torch
from cuda_law import DTYPES, assert_lawful, assert_training_lawful, images, vectors

import resnet_fast.functional as F
from resnet_fast import _native, backends
from resnet_fast.ops.bn_act import cuda as bn_act

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.fixture(autouse=True)
def built():
    reason = _native.cuda_why_not()
    assert reason is None, reason


def results(function, tensors, backend, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]
    with backends.use_backend(backend):
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, torch.cos(y.detach() * 3))


def compare(function, tensors):
    tensors = [t.cuda() for t in tensors]
    got, spec = results(function, tensors, "cuda"), results(function, tensors, "eager")
    exact = results(function, tensors, "eager", torch.float64)
    for i, (g, s, e) in enumerate(zip(got, spec, exact)):
        size = float(e.abs().max()) * (8 if g.dim() == 1 else 1)
        assert_lawful(g.cpu(), s.cpu(), e.cpu(), f"result {i}", size=size)


SHAPES = [(8, 64, 56, 56), (4, 2048, 7, 7), (2, 65, 9, 7), (1, 3, 5, 5), (64, 64, 112, 112)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_operators(shape, dtype):
    x, residual = images(*shape, dtype, seed=1), images(*shape, dtype, seed=2)
    gamma, beta = vectors(shape[1], 3)
    compare(F.add_relu, [x, residual])
    for training in (True, False):

        def norm(x, gamma, beta, r=None, training=training):
            statistics = torch.zeros_like(gamma), torch.ones_like(gamma)
            return F.bn_act(x, *statistics, gamma, beta, r, training)

        compare(norm, [x, gamma, beta])
        compare(norm, [x, gamma, beta, residual])
    compare(lambda t: F.max_pool2d(t, 3, 2, 1), [x])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_pass_and_several_agree(shape):
    x = images(*shape, torch.bfloat16, shift=100.0).cuda()
    arguments = (x, None, None, None, None, None, True, 1e-5, True)
    several, chosen = bn_act.fwd(*arguments, passes=1), bn_act.fwd(*arguments)
    assert_training_lawful(several, arguments)
    assert_training_lawful(chosen, arguments)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(chosen, bn_act.fwd(*arguments))), "the same bits every time"


def test_another_stream():
    x = images(32, 256, 28, 28, seed=4).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), backends.use_backend("cuda"):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        y = F.add_relu(late, late)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, torch.relu(x + x))


def test_captured_in_a_graph():
    x = images(8, 64, 28, 28, seed=5).cuda()
    mean, var = torch.zeros(64).cuda(), torch.ones(64).cuda()

    def step():
        with backends.use_backend("cuda"):
            return F.max_pool2d(F.bn_act(x, mean, var, training=False), 3, 2, 1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    x.copy_(images(8, 64, 28, 28, seed=6))
    graph.replay()
    assert torch.equal(y, step())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device here")
def test_the_second_device():
    x = images(2, 8, 5, 5).to("cuda:1")
    with backends.use_backend("cuda"):
        assert torch.equal(F.add_relu(x, x), torch.relu(x + x))
    assert torch.cuda.current_device() == 0


def test_more_than_two_to_the_31_elements():
    size = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 4 * 2 * size:
        pytest.skip("the card has less than 18 GB free")
    x = torch.ones(size // 64, 64, 1, 1, dtype=torch.bfloat16, device="cuda")
    with backends.use_backend("cuda"):
        assert bool((F.add_relu(x, x) == 2).all())
