"""The same cases on a GPU, where there is one: real launches, tile choice by timing, graph capture."""

import copy

import pytest
import torch
from cases import (
    FLOATS,
    check_add_relu,
    check_bn_act,
    check_bn_mean,
    check_bn_pool,
    check_max_pool,
    check_scale_add_relu,
    random,
    room,
)
from conv_cases import (
    GEOMETRIES,
    STEMS,
    check_backward,
    check_folded,
    check_forward,
    check_fused,
    check_prologue,
    check_prologue_backward,
    check_stem,
)
from law import within_law

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
    check_scale_add_relu((3, channels, 9, 7), dtype, nan=True, device="cuda")
    for training in (True, False):
        check_bn_mean((3, channels, 7, 7), dtype, training=training, device="cuda")
        check_bn_pool((2, channels, 11, 9), dtype, (3, 3), (2, 2), (1, 1), training=training, device="cuda")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolution(name, dtype, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_TUNE", "0")
    check_forward(name, dtype, device="cuda")
    check_fused(name, dtype, device="cuda")
    check_folded(name, dtype, device="cuda")
    check_prologue(name, dtype, device="cuda")
    check_backward(name, dtype, device="cuda")
    for training in (True, False):
        check_prologue_backward(name, dtype, training, device="cuda")


@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("name", STEMS)
def test_stem(name, dtype):
    check_stem(name, dtype, device="cuda")
    check_stem(name, dtype, ceil=True, affine=False, nan=True, device="cuda")


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


def test_cudnns_fused_convolution():
    """What the room refuses it must say; what it takes it must compute (its self-test has NaN among the values)."""
    x, weight = random((2, 16, 8, 8), torch.float16, 0, "cuda"), random((16, 16, 3, 3), torch.float16, 1, "cuda")
    vectors = [torch.ones(16, device="cuda") for _ in range(4)]
    given = (x, weight, None, *vectors, x, 1e-5, True, [1, 1], [1, 1], [1, 1], 1)
    from resnet_fast.ops.conv_bn_act import cudnn, eager

    reason = cudnn.why_not("fwd", *given)
    if reason is not None:
        pytest.skip(reason)
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in given]
    within_law(cudnn.fwd(*given), eager.fwd(*given), eager.fwd(*wide), "y")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_frozen_model_in_a_graph(dtype):
    import resnet_fast

    torch.manual_seed(0)
    model = resnet_fast.models.resnet18(num_classes=10).eval().cuda()
    frozen = resnet_fast.freeze(model, dtype=dtype)
    x, other = (torch.randn(n, 3, 64, 64, device="cuda") for n in (2, 3))
    plain = frozen(x)
    frozen.prepare(x)
    assert x in frozen.graphs and other not in frozen.graphs
    assert torch.equal(frozen(x), plain), "the graph has the choices that were measured before it"
    eager, exact = copy.deepcopy(model).to(dtype), copy.deepcopy(model).double()
    found = [[], [], []]
    with torch.no_grad():
        for _ in range(24):  # 480 logits: of a few the largest error is a draw
            fresh = torch.randn_like(x)
            for place, y in zip(found, (frozen(fresh), eager(fresh.to(dtype)), exact(fresh.double()))):
                place.append(y.double())
    ours, theirs, truth = (torch.cat(place) for place in found)
    error, own = ((t - truth).square().mean().sqrt() for t in (ours, theirs))
    # Frozen networks are held to three times eager's root mean square error (README, Accuracy).
    assert error <= 3 * own + torch.finfo(dtype).eps / 2 * truth.abs().max(), (error, own)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    expected = frozen(fresh)
    with torch.cuda.stream(stream):
        again = frozen(fresh)
    stream.synchronize()
    assert torch.equal(again, expected) and frozen(other).shape == (3, 10)


def test_tune_on_a_card():
    """Every tile and room is chosen ahead; the step after it measures nothing, and a captured step none either."""
    import resnet_fast
    from resnet_fast import backends

    model = resnet_fast.nn.BasicBlock(16, 16).cuda().train().to(memory_format=torch.channels_last)
    x = random((2, 16, 8, 8), torch.float32, 0, "cuda")
    assert resnet_fast.tune(model, x) > 0 and resnet_fast.tune(model, x) == 0
    backends_tune, backends._tune = backends._tune, lambda *a: pytest.fail(f"measured again: {a[:2]}")
    try:
        model(x).sum().backward()
    finally:
        backends._tune = backends_tune
