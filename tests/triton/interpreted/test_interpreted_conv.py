"""The convolution rooms in Triton's interpreter: every geometry, every epilogue, all gradients."""

import copy
import itertools

import pytest
import torch
from cases import FLOATS, random, room
from conv_cases import (
    GEOMETRIES,
    STEMS,
    check_backward,
    check_chain,
    check_combination,
    check_folded,
    check_forward,
    check_fused,
    check_prologue,
    check_prologue_backward,
    check_statistics,
    check_stem,
    given,
)

from resnet_fast import functional
from resnet_fast.backends import use_backend
from resnet_fast.ops.conv2d.triton_tiles import Tile, use

QUICK = list(zip(GEOMETRIES, FLOATS * 7))  # each geometry once, the dtypes in turn


@pytest.mark.parametrize("name, dtype", QUICK)
def test_forward(name, dtype):
    check_forward(name, dtype)
    check_fused(name, dtype)


@pytest.mark.parametrize("name, dtype", QUICK)
def test_backward(name, dtype):
    check_backward(name, dtype)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_epilogues(residual, relu, affine):
    check_fused("odd channels", torch.bfloat16, residual, relu, affine)
    check_fused("odd channels", torch.bfloat16, residual, relu, affine, other=torch.float32)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_folded(residual, relu):
    check_folded("3x3", torch.float16, residual, relu)
    check_folded("stem", torch.float32, residual, relu)


FLAGS = list(itertools.product((False, True), repeat=5))  # prologue, scale, shift, residual, relu


@pytest.mark.parametrize("flags, dtype", list(zip(FLAGS, FLOATS * 11)))
def test_combinations(flags, dtype):
    """Every prologue with every epilogue; the dtypes in turn."""
    check_combination("3x3", dtype, *flags)


@pytest.mark.parametrize("flags, dtype", list(zip(itertools.product((False, True), repeat=2), FLOATS * 2)))
def test_combinations_with_statistics(flags, dtype):
    """With and without a prologue and a bias."""
    with use(Tile(32, 32, 16)):
        check_combination("3x3", dtype, flags[0], False, flags[1], False, False, statistics=True)


@pytest.mark.proof
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("prologue", [False, True])
def test_proof_combinations_with_statistics(prologue, shift, dtype):
    for name in ("1x1 stride 2", "groups", "many odd channels"):
        with use(Tile(32, 32, 16)):
            check_combination(name, dtype, prologue, False, shift, False, False, statistics=True)


@pytest.mark.proof
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("flags", FLAGS)
def test_proof_combinations(flags, dtype):
    """In every dtype, on strides, groups, dilation and few channels, and split among programs."""
    with use(Tile(32, 32, 16, split=3)):
        check_combination("many odd channels", dtype, *flags, seed=20)
    for name in ("1x1", "3x3 stride 2", "groups", "dilation", "stem 3x3", "asymmetric"):
        check_combination(name, dtype, *flags, seed=40)


@pytest.mark.parametrize("name, dtype", QUICK[::3])
def test_statistics(name, dtype):
    with use(Tile(32, 32, 16)):
        check_statistics(name, dtype)


@pytest.mark.parametrize("name, dtype", QUICK)
def test_prologue(name, dtype):
    check_prologue(name, dtype)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_prologue_options(training, affine):
    check_prologue("many odd channels", torch.float16, training, affine, bias=False)
    with use(Tile(32, 32, 16, split=3)):
        check_prologue("3x3", torch.float16, training, affine)


@pytest.mark.parametrize("name, dtype", QUICK[1::4])
def test_prologue_and_statistics(name, dtype):
    with use(Tile(32, 32, 16)):
        check_chain(name, dtype)


@pytest.mark.parametrize("name, dtype, training", [(*case, i % 2 == 0) for i, case in enumerate(QUICK)])
def test_prologue_backward(name, dtype, training):
    """The norm before a convolution in its backward; statistics the batch's and known, in turn."""
    check_prologue_backward(name, dtype, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name, dtype", [c for c in QUICK if c[0] in ("3x3", "1x1 stride 2", "groups", "asymmetric")])
def test_prologue_backward_is_bit_for_bit(name, dtype, training):
    with use(Tile(32, 32, 32)):
        check_prologue_backward(name, dtype, training, bitwise=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["3x3", "1x1", "groups"])
def test_prologue_backward_options(name, training):
    """No affine parameters, vectors in 16 bit, split sums, NaN and infinities."""
    check_prologue_backward(name, torch.float16, training, affine=False)
    check_prologue_backward(name, torch.bfloat16, training, vectors=torch.bfloat16, seed=20)
    with use(Tile(32, 32, 16, split=3)):
        check_prologue_backward(name, torch.float16, training, seed=40)
    check_prologue_backward(name, torch.float32, training, nan=True, seed=60)


@pytest.mark.parametrize("bits", range(32))
def test_prologue_backward_wants(bits):
    wants = tuple(bool(bits >> i & 1) for i in range(5))
    small = ((1, 8, 4, 5), (8, 8, 3, 3), 1 + bits % 3 // 2, 1, 1, 1)
    check_prologue_backward(small, torch.float32, bits % 2 == 0, wants=wants, seed=bits)


@pytest.mark.parametrize("name", ["3x3", "1x1"])
def test_prologue_backward_from_a_stored_activation(name):
    """The weight gradient's other way, for filters whose prologue has a mask."""
    check_prologue_backward(name, torch.float16, way="stored", seed=3)


def test_prologue_backward_is_taken_without_a_measurement(monkeypatch):
    """Backward whole, forward by its parts; asked for by name both whole."""
    from resnet_fast import backends

    monkeypatch.setenv("RESNET_FAST_TUNE", "0")
    z, weight = random((1, 8, 5, 5), torch.float32, 0), random((8, 8, 3, 3), torch.float32, 1)
    for name, forward in (("auto", False), ("triton", True)):
        x = z.clone().requires_grad_()
        with use_backend(name), backends.record() as events:
            functional.bn_act_conv2d(x, None, None, None, None, weight, training=True, padding=1).sum().backward()
        assert ("bn_act_conv2d", "bwd", "triton") in events
        assert (("bn_act_conv2d", "fwd", "triton") in events) == forward


def test_prologue_pays_by_counted_work():
    """1x1 always; 3x3 where the map is large for its channels, or is read at a stride."""
    from resnet_fast.ops.bn_act_conv2d import triton

    def pays(c, h, k, taps, stride=1):
        z, weight = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((32, c, h, h), (k, c, taps, taps)))
        dout = torch.empty(32, k, h // stride, h // stride, dtype=torch.bfloat16, device="meta")
        return triton._prologue_pays(dout, z, weight, [stride] * 2, [taps // 2] * 2, [1, 1], 1)

    assert pays(64, 56, 256, 1) and pays(512, 7, 2048, 1)
    assert pays(64, 56, 64, 3) and pays(128, 56, 128, 3, 2)
    assert not pays(128, 28, 128, 3) and not pays(512, 7, 512, 3)


def test_prologue_backward_merges_in_two_levels(monkeypatch):
    monkeypatch.setattr(room("bn_act"), "MERGE", (2, 16))
    with use(Tile(16, 16, 16)):
        check_prologue_backward(((4, 16, 11, 13), (24, 16, 1, 1), 1, 0, 1, 1), torch.float16)


def test_prologue_backward_over_processes_is_the_parts():
    """Where the sums dz needs are not this process's alone the operator is not run whole; in one process nothing changes."""
    from resnet_fast import backends

    z, weight, geometry = given("3x3", torch.float32, 0)
    dout = random((2, 32, 7, 9), torch.float32, 2)
    mean, var = room("bn_act").statistics(z)
    count = torch.full((1,), 2.0 * 7 * 9, dtype=torch.float64)
    gamma, beta = torch.ones(16), torch.zeros(16)
    found = {}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for group in ("", torch.distributed.group.WORLD.group_name):
            tensors = (dout, z, gamma, beta, mean, var, count, weight)
            with use_backend("triton"), backends.record() as events:
                grads = torch.ops.resnet_fast.bn_act_conv2d_backward(
                    *tensors, True, True, 1e-5, *geometry, group, [True] * 5
                )
            assert (("bn_act_conv2d", "bwd", "triton") in events) == (group == "")
            assert (("bn_act", "dx", "triton") in events) == (group != "")
            found[group] = grads
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name, dtype", list(zip(STEMS, FLOATS[1:] * 3)))
def test_stem(name, dtype):
    check_stem(name, dtype)
    check_stem(name, dtype, ceil=True, affine=False, nan=True, seed=20)


@pytest.mark.parametrize("frozen", [False, True])
def test_stem_of_a_network(frozen):
    """Converted modules without gradients, and frozen ones, run it whole; the numbers are eager's by the law."""
    from law import within_law

    from resnet_fast import backends, nn
    from resnet_fast._plan import FoldedProgram
    from resnet_fast._trace import trace
    from resnet_fast.models.resnet import resnet18

    torch.manual_seed(0)
    net = resnet18(num_classes=3).eval().bfloat16()
    stem = torch.nn.Sequential(net.conv1, net.bn1, torch.nn.ReLU(), net.maxpool)
    x = random((1, 3, 32, 30), torch.bfloat16, 0)
    with torch.no_grad(), use_backend("triton"), backends.record() as events:
        if frozen:
            y = FoldedProgram(copy.deepcopy(stem), trace(copy.deepcopy(stem), deep=True), torch.bfloat16)(x)
        else:
            y = nn.fused.stem(x, [(net.conv1, net.bn1)], net.maxpool)
    assert ("recomputed_conv_bn_act", "fwd", "triton") in events
    with torch.no_grad():
        within_law(y, stem(x), copy.deepcopy(stem).double()(x.double()), "stem")


class SqueezeExcite(torch.nn.Module):
    """A residual block's end behind a gate."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(16, 16, 3, padding=1, bias=False), torch.nn.BatchNorm2d(16)
        self.down, self.up = torch.nn.Conv2d(16, 4, 1), torch.nn.Conv2d(4, 16, 1)

    def forward(self, x):
        """relu(y * gate(mean of y) + x) of y = bn(conv(x))."""
        y = self.bn(self.conv(x))
        gate = torch.sigmoid(self.up(torch.relu(self.down(y.mean((2, 3), keepdim=True)))))
        y = y * gate
        y += x
        return torch.relu(y)


def test_squeeze_and_excite():
    """Its product, addition and ReLU are one operator, frozen and in training; the numbers are eager's by the law."""
    from law import within_law

    import resnet_fast
    from resnet_fast import backends
    from resnet_fast._plan import FoldedProgram
    from resnet_fast._trace import trace

    torch.manual_seed(0)
    block, x = SqueezeExcite().eval(), random((2, 16, 7, 7), torch.float32, 0)
    frozen = FoldedProgram(copy.deepcopy(block), trace(copy.deepcopy(block), deep=True), torch.float32)
    with torch.no_grad(), use_backend("triton"), backends.record() as events:
        y = frozen(x)
    assert ("scale_add_relu", "fwd", "triton") in events
    with torch.no_grad():
        within_law(y, block(x), copy.deepcopy(block).double()(x.double()), "frozen")
    converted = resnet_fast.convert(copy.deepcopy(block).train())
    with use_backend("triton"), backends.record() as events:
        converted(x.clone().requires_grad_()).square().sum().backward()
    assert {("scale_add_relu", "fwd", "triton"), ("scale_add_relu", "bwd", "triton")} <= set(events)


@pytest.mark.parametrize("bits", range(8))
def test_wants(bits):
    check_backward("3x3", torch.float32, tuple(bool(bits >> i & 1) for i in range(3)))


@pytest.mark.parametrize("name, split", [("3x3", 7), ("1x1", 2), ("many odd channels", 2)])
def test_split(name, split):
    with use(Tile(32, 32, 16, split=split)):
        check_fused(name, torch.bfloat16)
        check_backward(name, torch.float16)


@pytest.mark.proof
@pytest.mark.parametrize("name", ["3x3", "1x1", "many odd channels", "groups", "large filter"])
@pytest.mark.parametrize("split", [2, 3, 7])
def test_proof_split(name, split):
    with use(Tile(32, 32, 16, split=split)):
        check_forward(name, torch.float32)
        check_fused(name, torch.bfloat16)
        check_backward(name, torch.float16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_beside_a_window_of_pairs(value):
    """A pixel just outside a filter is multiplied by no zero: neither in pairs of pixels nor in the stem's window."""
    from resnet_fast.ops.conv2d import eager

    for name in ("7x7", "wide"):
        x, weight, geometry = given(STEMS[name], torch.bfloat16, 0)
        x[0, 1, 5, 8] = value
        ours, theirs = room("conv2d").fwd(x, weight, None, *geometry), eager.fwd(x, weight, None, *geometry)
        assert bool(theirs.isfinite().any()) and torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_spread_as_in_eager(value):
    from resnet_fast.ops.conv_bn_act import eager

    x = random((1, 16, 6, 6), torch.float32, 0)
    x[0, 3, 2, 2] = value
    weight, ones = random((8, 16, 3, 3), torch.float32, 1), torch.ones(8)
    given = (x, weight, None, None, None, ones, ones, None, 1e-5, True, [1, 1], [1, 1], [1, 1], 1)
    ours, theirs = room("conv_bn_act").fwd(*given), eager.fwd(*given)
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())


def test_operators_through_autograd():
    """The public functions with the triton backend asked for by name, forward and backward, against eager."""
    from resnet_fast.testing import check

    found = {}
    for backend, dtype in (("triton", torch.float32), ("eager", torch.float32), ("eager", torch.float64)):
        x = random((2, 8, 8, 8), torch.float32, 0).to(dtype).requires_grad_()
        weight = random((8, 8, 3, 3), torch.float32, 1, scale=0.1).to(dtype).requires_grad_()
        gamma, beta = torch.ones(8, dtype=dtype).requires_grad_(), torch.zeros(8, dtype=dtype).requires_grad_()
        mean, var = torch.zeros(8, dtype=dtype), torch.ones(8, dtype=dtype)
        with use_backend(backend):
            y = functional.conv_bn_act(x, weight, None, mean, var, gamma, beta, residual=x, training=True, padding=1)
            y = functional.max_pool2d(functional.add_relu(y, x), 3, 2, 1)
            y.square().sum().backward()
        found[backend, dtype] = (y.detach(), x.grad, weight.grad, gamma.grad, beta.grad, mean, var)
    # Judged together: of some there are only eight values, and eager's error of those is a draw.
    sizes = [v.abs().max() for v in found["eager", torch.float64]]
    check.law(*([t.flatten() / size.to(t.dtype) for t, size in zip(result, sizes)] for result in found.values()))


@pytest.mark.proof
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_proof(name, dtype):
    check_forward(name, dtype, bias=False, seed=100)
    check_forward(name, dtype, seed=200)
    check_fused(name, dtype, residual=False, seed=300)
    check_fused(name, dtype, seed=400)
    check_backward(name, dtype, seed=500)
    check_prologue(name, dtype, training=False, seed=600)
    check_prologue_backward(name, dtype, dtype != torch.float16, seed=700)
