"""The element-wise rooms in Triton's interpreter."""

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
)

ODD = [1, 3, 5, 65, 127]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 64, 7, 7), (3, 1, 1, 1), (5,)])
def test_add_relu(shape, dtype):
    check_add_relu(shape, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_add_relu_keeps_nan(dtype):
    check_add_relu((2, 8, 5, 3), dtype, nan=True)


def test_add_relu_promotes():
    check_add_relu((2, 8, 5, 3), torch.float32, other=torch.bfloat16)
    check_add_relu((2, 8, 5, 3), torch.float16, other=torch.bfloat16)


@pytest.mark.parametrize("channels", ODD)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bn_act_training(channels, dtype):
    check_bn_act((3, channels, 5, 7), dtype, residual=channels % 2 == 0)
    check_bn_act((3, channels, 5, 7), dtype, residual=True, seed=50)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("affine", [(True, True), (False, False), (True, False), (False, True)])
def test_bn_act_options(training, relu, residual, affine):
    check_bn_act((2, 6, 3, 5), torch.float32, residual, relu, training, affine)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bits", range(16))
def test_bn_act_wants(training, bits):
    wants = tuple(bool(bits >> i & 1) for i in range(4))
    check_bn_act((2, 4, 3, 3), torch.float32, True, True, training, wants=wants)


def test_bn_act_dtypes():
    check_bn_act((2, 8, 3, 5), torch.bfloat16, residual=True, other=torch.float32)
    check_bn_act((2, 8, 3, 5), torch.float16, vectors=torch.float16, training=False)


@pytest.mark.parametrize("scale, shift", [(1.0, 1e3), (1.0, 1e4), (1e-3, 0.0), (1e3, -1e4)])
def test_bn_act_far_from_zero(scale, shift):
    from cases import random, room
    from conv_cases import statistics_within_law

    x = random((4, 5, 40, 40), torch.float32, 3, scale=scale, shift=shift)
    _, mean, var = room("bn_act").fwd(x, None, None, None, None, None, True, 1e-5, False)
    statistics_within_law(x, mean, var)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_bn_act_special(value):
    from cases import FLOAT32_SUM, random, room
    from law import within_law

    x = random((2, 4, 5, 5), torch.float32, 0)
    x[1, 2, 3, 3] = value
    ours = room("bn_act").fwd(x, None, None, None, None, None, True, 1e-5, True)[0]
    eager = torch.nn.functional.batch_norm(x, None, None, training=True).relu()
    assert torch.equal(ours[:, 2].isnan(), eager[:, 2].isnan())
    truth = torch.nn.functional.batch_norm(x.double(), None, None, training=True).relu()
    within_law(ours[:, :2], eager[:, :2], truth[:, :2], "other channels", FLOAT32_SUM * float(truth[:, :2].abs().max()))


def test_bn_act_repeats_bitwise():
    from cases import random, room

    x = random((4, 24, 17, 13), torch.float32, 3)
    first = room("bn_act").fwd(x, None, None, None, None, None, True, 1e-5, True)
    for _ in range(2):
        again = room("bn_act").fwd(x, None, None, None, None, None, True, 1e-5, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "kernel, stride, padding, dilation, ceil",
    [
        ((3, 3), (2, 2), (1, 1), (1, 1), False),
        ((2, 2), (2, 2), (0, 0), (1, 1), True),
        ((3, 2), (1, 3), (1, 0), (2, 1), False),
    ],
)
def test_max_pool(kernel, stride, padding, dilation, ceil, dtype):
    check_max_pool((2, 5, 11, 9), dtype, kernel, stride, padding, dilation, ceil)
    check_max_pool((1, 33, 8, 8), dtype, kernel, stride, padding, dilation, ceil, nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "kernel, stride, padding, dilation, ceil",
    [
        ((3, 3), (2, 2), (1, 1), (1, 1), False),
        ((2, 2), (2, 2), (0, 0), (1, 1), True),
        ((3, 2), (1, 3), (1, 0), (2, 1), False),
        ((3, 3), (2, 1), (1, 1), (1, 2), True),
    ],
)
def test_bn_pool(kernel, stride, padding, dilation, ceil, dtype):
    check_bn_pool((2, 5, 11, 9), dtype, kernel, stride, padding, dilation, ceil)
    check_bn_pool((1, 33, 8, 8), dtype, kernel, stride, padding, dilation, ceil, training=False, nan=True)


@pytest.mark.proof
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("bits", range(8))
def test_proof_bn_pool_options(training, affine, bits):
    wants = [bool(bits >> i & 1) for i in range(3)]
    check_bn_pool((2, 4, 7, 8), torch.float32, (3, 3), (2, 2), (1, 1), training=training, affine=affine, wants=wants)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [(True, True), (False, False), (True, False), (False, True)])
def test_bn_pool_options(training, affine):
    for bits in (0, 5, 7) if affine == (True, True) else (7,):
        wants = [bool(bits >> i & 1) for i in range(3)]
        check_bn_pool(
            (2, 4, 7, 8), torch.float32, (3, 3), (2, 2), (1, 1), training=training, affine=affine, wants=wants
        )


def test_max_pool_all_minus_infinity():
    from cases import room

    x = torch.full((1, 3, 5, 5), -float("inf")).to(memory_format=torch.channels_last)
    y, place = room("max_pool2d").fwd(x, [3, 3], [2, 2], [1, 1], [1, 1], [3, 3], True)
    assert bool((y == -float("inf")).all()) and int(place[0, 0, 0, 0]) == 4  # the first place inside the image


@pytest.mark.parametrize("channels", ODD)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bn_mean(channels, dtype):
    check_bn_mean((3, channels, 5, 7), dtype, nan=True)
    check_bn_mean((3, channels, 1, 1), dtype, training=False, seed=50)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("affine", [(True, True), (False, False), (True, False), (False, True)])
def test_bn_mean_options(training, residual, affine):
    check_bn_mean((2, 6, 3, 5), torch.float32, residual, training, affine)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual, bits", [*((True, b) for b in range(16)), *((False, b) for b in range(8))])
def test_bn_mean_wants(training, residual, bits):
    wants = tuple(bool(bits >> i & 1) for i in range(4))
    check_bn_mean((2, 4, 3, 3), torch.float32, residual, training, wants=wants)


@pytest.mark.parametrize("channels", ODD)
@pytest.mark.parametrize("dtype", FLOATS)
def test_scale_add_relu(channels, dtype):
    check_scale_add_relu((3, channels, 5, 7), dtype, nan=True)
    check_scale_add_relu((3, channels, 1, 1), dtype, seed=50)


@pytest.mark.parametrize("bits", range(8))
def test_scale_add_relu_wants(bits):
    check_scale_add_relu((2, 4, 3, 3), torch.float32, wants=tuple(bool(bits >> i & 1) for i in range(3)))


def test_ends_of_several_dtypes():
    check_scale_add_relu((2, 8, 3, 5), torch.bfloat16, other=torch.float32)
    check_bn_mean((2, 8, 3, 5), torch.bfloat16, other=torch.float32)


def test_scale_add_relu_adds_parts(monkeypatch):
    """An image so large that several programs share it: their sums are added by a second kernel."""
    from resnet_fast.ops import triton_common

    launched = []
    launch = triton_common.launch
    monkeypatch.setattr(
        triton_common, "launch", lambda kernel, *given: launched.append(kernel.fn.__name__) or launch(kernel, *given)
    )
    check_scale_add_relu((1, 16, 40, 41), torch.float32)
    assert launched == ["scale_add_relu_forward", "scale_add_relu_backward", "sum_scale_parts"]
