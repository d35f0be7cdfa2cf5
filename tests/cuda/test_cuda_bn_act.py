"""bn_act's CUDA kernels, executed: values, tails, statistics far from zero, one pass and several, bytes."""

from __future__ import annotations

import pytest
import torch
from cuda_law import DTYPES, assert_lawful, assert_training_lawful, images, vectors

from resnet_fast.ops.bn_act import cuda as room
from resnet_fast.ops.bn_act import eager

SEVERAL, SINGLE = 1, 2
# (N, C, H, W): packs and single elements, one tile of channels and several, fewer rows than a block is high, odd rows
SHAPES = [(2, 64, 7, 9), (1, 3, 5, 5), (2, 5, 9, 3), (1, 65, 3, 7), (2, 127, 5, 5), (2, 1, 11, 13), (1, 512, 3, 3)]
MORE_SHAPES = [(3, 24, 17, 5), (8, 8, 8, 8), (1, 320, 9, 7), (2, 2, 1, 1), (1, 16, 40, 41), (5, 2048, 2, 1)]


def double(t):
    return None if t is None else t.double()


def forward_exact(x, weight, bias, mean, var, residual, training, eps, relu):
    return eager.fwd(*(double(t) for t in (x, weight, bias, mean, var, residual)), training, eps, relu)


def check_forward(card, arguments, passes=0):
    y, mean, var = card.run(room.fwd, *arguments, passes=passes)
    spec, exact = eager.fwd(*arguments), forward_exact(*arguments)
    for what, got, e, x in zip(("y", "mean", "var"), (y, mean, var), spec, exact):
        assert_lawful(got, e, x, what, size=float((x if what == "y" else arguments[0]).abs().max()))
    assert y.stride() == spec[0].stride()


def forward_arguments(shape, dtype, training, residual, relu=True, affine=True, seed=0):
    x = images(*shape, dtype, scale=1.5, shift=0.7, seed=seed)
    gamma, beta = vectors(shape[1], seed) if affine else (None, None)
    statistics = (None, None) if training else (torch.randn(shape[1]), torch.rand(shape[1]) + 0.1)
    r = images(*shape, dtype, seed=seed + 1) if residual else None
    return x, gamma, beta, *statistics, r, training, 1e-5, relu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(card, shape, dtype):
    check_forward(card, forward_arguments(shape, dtype, True, residual=shape[1] % 2 == 0), SEVERAL)
    assert card.names() == ["bn_statistics", "bn_finish", "bn_apply"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_inference(card, residual, dtype):
    for shape in SHAPES[:4]:
        check_forward(card, forward_arguments(shape, dtype, False, residual, relu=not residual, affine=residual))
        assert card.names() == ["bn_apply"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 7, 9), (1, 512, 3, 3), (2, 8, 31, 33), (1, 24, 3, 2)], ids=str)
def test_one_pass(card, shape, dtype):
    for card.order, quantum in ((0, 20000), (7, 7)):
        card.options = {"quantum": quantum}
        check_forward(card, forward_arguments(shape, dtype, True, residual=True), SINGLE)
        assert card.names() == ["bn_single_pass"] and card.ran[0].cooperative


@pytest.mark.parametrize("passes", [SEVERAL, SINGLE])
def test_mean_far_from_zero(card, passes):
    """Where E[x^2] - E[x]^2 has no digit left."""
    x = images(4, 32, 16, 16, scale=1.0, shift=1e4, seed=3)
    _, mean, var = card.run(room.fwd, x, None, None, None, None, None, True, 1e-5, True, passes=passes)
    exact = x.double()
    assert (
        (var.double() - exact.var((0, 2, 3), unbiased=False)) / exact.var((0, 2, 3), unbiased=False)
    ).abs().max() < 1e-5
    assert (mean.double() - exact.mean((0, 2, 3))).abs().max() < 1e4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("passes", [SEVERAL, SINGLE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_law_at_a_mean_of_a_hundred(card, passes, dtype):
    """The check a GPU runs on larger tensors."""
    arguments = (images(2, 64, 9, 7, dtype, shift=100.0, seed=5), None, None, None, None, None, True, 1e-5, True)
    assert_training_lawful(card.run(room.fwd, *arguments, passes=passes), arguments)


def test_the_law_has_teeth():
    """A mean that is off by one thousandth of the spread is no rounding."""
    arguments = (images(2, 8, 9, 7, torch.bfloat16, shift=100.0), None, None, None, None, None, True, 1e-5, True)
    y, mean, var = eager.fwd(*arguments)
    assert_training_lawful((y, mean, var), arguments)
    for wrong in ((y, mean + 1e-3, var), (y, mean, var * (1 + 2e-5)), (y * 1.02, mean, var)):
        with pytest.raises(AssertionError):
            assert_training_lawful(wrong, arguments)


def test_nan_stays_in_its_channel(card):
    x = images(2, 16, 5, 5, seed=4)
    x[1, 3, 2, 2] = float("nan")
    for passes in (SEVERAL, SINGLE):
        y, mean, var = card.run(room.fwd, x, None, None, None, None, None, True, 1e-5, True, passes=passes)
        channels = torch.arange(16) == 3
        assert torch.equal(mean.isnan(), channels) and torch.equal(var.isnan(), channels)
        assert torch.equal(y.isnan().all((0, 2, 3)), channels) and torch.equal(y.isnan().any(3).any(2).any(0), channels)


def test_forward_bytes_are_the_floor(card):
    x, residual = images(4, 64, 12, 12, torch.bfloat16), images(4, 64, 12, 12, torch.bfloat16, seed=1)
    size, vector = x.numel() * 2, 64 * 4
    call = (x, None, None, None, None, residual, True, 1e-5, True)
    card.run(room.fwd, *call, passes=SEVERAL)
    statistics, finish, apply = (r.report.counters for r in card.ran)
    partials = statistics["distinct_write_bytes"]
    assert statistics["distinct_read_bytes"] == size
    assert partials == finish["distinct_read_bytes"] <= 2 * card.sms * 2 * vector + vector
    assert finish["distinct_write_bytes"] == 2 * vector
    assert apply["distinct_read_bytes"] == 2 * size + 2 * vector and apply["distinct_write_bytes"] == size
    card.run(room.fwd, *call, passes=SINGLE)
    (single,) = (r.report.counters for r in card.ran)
    x_sectors = single["global_load_sector_bytes"]
    assert single["distinct_write_bytes"] - size <= partials + 2 * vector
    # x is loaded once: what exceeds x and the residual is the first row and the partials, which every block reads
    every_block = partials + 256 * 16 + 4 * vector
    assert card.ran[0].grid * every_block < size
    assert x_sectors <= 2 * size + card.ran[0].grid * every_block


def test_one_pass_falls_back_where_it_does_not_fit(card):
    card.sms = 1
    x = images(2, 64, 40, 40, seed=5)  # 819 kB on a card with 164 kB
    arguments = (x, None, None, None, None, None, True, 1e-5, True)
    card.run(room.fwd, *arguments)
    assert card.names() == ["bn_statistics", "bn_finish", "bn_apply"]
    with pytest.raises(ValueError, match=r"3200 rows and 64 channels does not fit"):
        card.run(room.fwd, *arguments, passes=SINGLE)


def test_same_bits_for_any_order(card):
    x = images(2, 40, 13, 13, torch.float16, seed=6)
    for passes in (SEVERAL, SINGLE):
        results = []
        for card.order in (0, -1, 4):
            card.options = {"quantum": 50}
            results.append(card.run(room.fwd, x, None, None, None, None, None, True, 1e-5, True, passes=passes))
        for r in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(r, results[0]))


@pytest.mark.proof
@pytest.mark.parametrize("sms", [1, 2, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES, ids=str)
def test_training_on_many_cards(card, shape, dtype, sms):
    card.sms, card.order = sms, sms
    for residual in (False, True):
        for relu in (False, True):
            check_forward(card, forward_arguments(shape, dtype, True, residual, relu, affine=relu, seed=sms), SEVERAL)
            check_forward(card, forward_arguments(shape, dtype, True, residual, relu, seed=sms))
            fits = card.fits_single(images(*shape, dtype))
            assert card.names()[0] == ("bn_single_pass" if fits else "bn_statistics")
            assert not fits or shape[1] * dtype.itemsize % 16 == 0
            check_forward(card, forward_arguments(shape, dtype, False, residual, relu, seed=sms))
