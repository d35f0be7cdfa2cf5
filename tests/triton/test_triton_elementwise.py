"""The compiled element-wise kernels, executed by the simulator: values, races, and the bytes they must move."""

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


@pytest.mark.parametrize("order", [0, -1, 5])
def test_add_relu(simulator, order):
    with simulator.running(order):
        check_add_relu((2, 16, 9, 9), FLOATS[order % 3])
        check_add_relu((2, 3, 5, 7), torch.bfloat16, nan=True)


@pytest.mark.parametrize("order, dtype", list(zip([0, -1, 7], FLOATS)))
def test_bn_act(simulator, order, dtype):
    with simulator.running(order):
        check_bn_act((3, 64, 12, 11), dtype, residual=True)
        check_bn_act((2, 65, 5, 7), dtype, residual=False)
        check_bn_act((2, 16, 5, 7), dtype, residual=True, training=False)


@pytest.mark.parametrize("order, dtype", list(zip([0, -1, 9], FLOATS)))
def test_max_pool(simulator, order, dtype):
    with simulator.running(order):
        check_max_pool((2, 16, 11, 9), dtype, (3, 3), (2, 2), (1, 1), nan=True)
        check_max_pool((1, 5, 8, 8), dtype, (3, 2), (1, 3), (1, 0), (2, 1))


@pytest.mark.parametrize("order, dtype", list(zip([0, -1, 9], FLOATS)))
def test_bn_pool(simulator, order, dtype):
    with simulator.running(order):
        check_bn_pool((2, 16, 11, 9), dtype, (3, 3), (2, 2), (1, 1))
        check_bn_pool((1, 5, 8, 8), dtype, (3, 2), (1, 3), (1, 0), (2, 1), training=False)


@pytest.mark.parametrize("order, dtype", list(zip([0, -1, 9], FLOATS)))
def test_bn_mean(simulator, order, dtype):
    with simulator.running(order):
        check_bn_mean((3, 64, 7, 7), dtype)
        check_bn_mean((2, 65, 5, 4), dtype, residual=False)
        check_bn_mean((2, 16, 5, 7), dtype, training=False, nan=True)


@pytest.mark.parametrize("order, dtype", list(zip([0, -1, 9], FLOATS)))
def test_scale_add_relu(simulator, order, dtype):
    with simulator.running(order):
        check_scale_add_relu((3, 64, 7, 7), dtype)
        check_scale_add_relu((2, 65, 9, 11), dtype, nan=True)


def distinct(report):
    """Distinct bytes read and written."""
    return report.counters["distinct_read_bytes"], report.counters["distinct_write_bytes"]


def only(reports, name):
    """The one launch of this kernel."""
    (report,) = [r for n, r in reports if n == name]
    return report


def test_compulsory_bytes(simulator):
    """Each kernel's distinct bytes are its operator's floor: every tensor once, besides per-channel vectors."""
    shape, c = (4, 64, 14, 14), 64
    x, residual, dy = (random(shape, torch.bfloat16, i) for i in range(3))
    size, vector = x.numel() * 2, 4 * c
    with simulator.running() as reports:
        y = room("add_relu").fwd(x, residual)
        room("add_relu").bwd(dy, y)
        y, mean, var = room("bn_act").fwd(x, None, None, None, None, residual, True, 1e-5, True)
        room("bn_act").bwd(dy, x, y, None, None, mean, var, True, 1e-5, True, [True] * 4)
    assert distinct(only(reports, "add_relu_forward")) == (2 * size, size)
    assert distinct(only(reports, "add_relu_backward")) == (2 * size, size)
    part = distinct(only(reports, "bn_statistics"))[1]
    assert distinct(only(reports, "bn_statistics"))[0] == size and part <= size / 15
    assert distinct(only(reports, "bn_merge")) == (part, 2 * vector)
    assert distinct(only(reports, "bn_apply")) == (2 * size + 2 * vector, size)
    read, written = distinct(only(reports, "bn_backward_reduce"))
    assert 3 * size <= read <= 3 * size + 2 * vector and written == size + part  # dresidual, once
    assert distinct(only(reports, "bn_backward_apply")) == (2 * size + 4 * vector, size)  # g and x, not dy and y
    for name, report in reports:
        assert report.counters["bank_conflicts"] == 0, name
        assert report.counters["global_store_useful_bytes"] >= distinct(report)[1], name


def test_compulsory_bytes_of_the_stem(simulator):
    """The normalised map is neither written nor read: forward x once, backward x, dy and the places twice, dx once."""
    x, c = random((2, 64, 12, 12), torch.bfloat16, 0), 64
    mean, var, window = torch.zeros(c), torch.ones(c), ([3, 3], [2, 2], [1, 1], [1, 1])
    size, vector = x.numel() * 2, 4 * c
    with simulator.running() as reports:
        y, places = room("bn_act_max_pool2d").fwd(x, None, None, mean, var, 1e-5, *window, [6, 6], True)
        room("bn_act_max_pool2d").bwd(y, places, x, None, None, mean, var, True, 1e-5, *window, [True] * 3)
    out = y.numel() * 2
    assert distinct(only(reports, "bn_pool_forward")) == (size + 2 * vector, out + y.numel())
    reduced = only(reports, "bn_pool_backward_reduce")
    assert distinct(reduced)[0] == size + out + y.numel() + vector
    assert distinct(only(reports, "bn_pool_backward_apply")) == (size + out + y.numel() + 4 * vector, size)


def test_compulsory_bytes_of_the_ends(simulator):
    """The last block's end writes no map, its gradient reads none; squeeze-and-excite's end reads and writes each once."""
    x, residual, c = random((4, 64, 7, 7), torch.bfloat16, 0), random((4, 64, 7, 7), torch.bfloat16, 1), 64
    mean, var = torch.zeros(c), torch.ones(c)
    size, vector, few = x.numel() * 2, 4 * c, 2 * 4 * c
    op, scale = room("bn_act_global_avg_pool2d"), random((4, 64, 1, 1), torch.bfloat16, 2)
    with simulator.running() as reports:
        y = op.fwd(x, None, None, mean, var, residual, 1e-5)
        op.bwd(y, x, None, None, mean, var, residual, True, 1e-5, [True] * 4)
        z = room("scale_add_relu").fwd(x, scale, residual)
        room("scale_add_relu").bwd(residual, x, scale, z, [True] * 3)
    part, sums = 2 * 4 * 4 * c, 4 * 4 * 2 * c  # two float32 sums per image and channel; one of each of its two parts
    assert distinct(only(reports, "bn_mean_forward")) == (2 * size + 2 * vector, few)
    assert distinct(only(reports, "bn_mean_backward_reduce")) == (2 * size + few + 2 * vector, size + part)
    assert distinct(only(reports, "bn_backward_apply")) == (2 * size + 4 * vector, size)
    assert distinct(only(reports, "scale_add_relu_forward")) == (2 * size + few, size)
    assert distinct(only(reports, "scale_add_relu_backward")) == (3 * size + few, 2 * size + sums)
    with simulator.running() as reports:  # no residual: its gradient is not there to be read, and x tells the mask
        op.bwd(y, x, None, None, mean, var, None, True, 1e-5, [True] * 3 + [False])
        assert distinct(only(reports, "bn_mean_backward_reduce")) == (size + few + 2 * vector, part)
        assert distinct(only(reports, "bn_mean_backward_apply")) == (size + few + 4 * vector, size)
    for name, report in reports:
        assert report.counters["bank_conflicts"] == 0, name


@pytest.mark.proof
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 5, 65, 127])
@pytest.mark.parametrize("order", [0, 11])
def test_proof_bn_act(simulator, channels, dtype, order):
    with simulator.running(order):
        for training in (True, False):
            check_bn_act((3, channels, 9, 7), dtype, residual=True, training=training, seed=order)
            check_bn_act((3, channels, 9, 7), dtype, residual=False, training=training, seed=order)
            check_bn_act((3, channels, 9, 7), dtype, relu=False, training=training, affine=(False, False))


@pytest.mark.proof
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 5, 65, 127])
def test_proof_others(simulator, channels, dtype):
    for order in (0, 13):
        with simulator.running(order):
            check_add_relu((3, channels, 9, 7), dtype, seed=order)
            check_max_pool((2, channels, 11, 9), dtype, (3, 3), (2, 2), (1, 1), nan=True, seed=order)
            check_max_pool((2, channels, 10, 7), dtype, (2, 2), (2, 2), (0, 0), ceil=True, seed=order)
            check_bn_pool((2, channels, 11, 9), dtype, (3, 3), (2, 2), (1, 1), seed=order)
            check_bn_pool((2, channels, 10, 7), dtype, (3, 2), (2, 1), (1, 0), ceil=True, training=False, seed=order)
            check_bn_mean((3, channels, 9, 7), dtype, seed=order)
            check_bn_mean((3, channels, 9, 7), dtype, residual=False, seed=order)
            check_bn_mean((3, channels, 9, 7), dtype, training=False, affine=(False, False), seed=order)
            check_scale_add_relu((3, channels, 9, 7), dtype, seed=order)
