"""The same cases on a GPU, where there is one: real launches, tile choice by timing, graph capture."""

import pytest
import torch
from cases import FLOATS, check_add_relu, check_bn_act, check_max_pool, random, room
from conv_cases import GEOMETRIES, check_backward, check_forward, check_fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def own_choices(monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 3, 65, 256])
def test_elementwise(channels, dtype):
    check_add_relu((3, channels, 9, 7), dtype, nan=True, device="cuda")
    for training in (True, False):
        for residual in (True, False):
            check_bn_act((3, channels, 9, 7), dtype, residual, training=training, device="cuda")
    check_max_pool((2, channels, 11, 9), dtype, (3, 3), (2, 2), (1, 1), nan=True, device="cuda")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolution(name, dtype, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_TUNE", "0")
    check_forward(name, dtype, device="cuda")
    check_fused(name, dtype, device="cuda")
    check_backward(name, dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tuned(dtype):
    check_fused(((8, 64, 28, 28), (128, 64, 3, 3), 1, 1, 1, 1), dtype, device="cuda")
    check_backward(((8, 64, 28, 28), (128, 64, 3, 3), 2, 1, 1, 1), dtype, device="cuda")


def test_graph_capture():
    x, weight = random((2, 16, 8, 8), torch.float16, 0, "cuda"), random((16, 16, 3, 3), torch.float16, 1, "cuda")
    vectors = [torch.ones(16, device="cuda") for _ in range(4)]
    given = (x, weight, None, *vectors, x, 1e-5, True, [1, 1], [1, 1], [1, 1], 1)
    expected = room("conv_bn_act").fwd(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = room("conv_bn_act").fwd(*given)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


def test_repeats_bitwise():
    x, weight = random((8, 64, 14, 14), torch.bfloat16, 0, "cuda"), random((64, 64, 3, 3), torch.bfloat16, 1, "cuda")
    given = (x, x, weight, False, [1, 1], [1, 1], [1, 1], 1, [True, True, False])
    first = room("conv2d").bwd(*given)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, room("conv2d").bwd(*given)))
