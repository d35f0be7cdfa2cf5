"""bn_act's backward CUDA kernels, executed: every mask, every subset of gradients, bytes."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from cuda_law import DTYPES, assert_lawful, images, vectors

from resnet_fast.ops.bn_act import cuda as room
from resnet_fast.ops.bn_act import eager

SHAPES = [(2, 64, 7, 9), (1, 3, 5, 5), (1, 65, 3, 7), (2, 127, 5, 5), (2, 1, 11, 13), (1, 512, 3, 3)]
MORE_SHAPES = [(3, 24, 17, 5), (8, 8, 8, 8), (2, 5, 9, 3), (1, 320, 9, 7), (1, 16, 40, 41), (5, 2048, 2, 1)]
ALL = [True] * 4
MASKS = ("none", "output", "recompute")
SUMS = ("dweight", "dbias")
FEW, POOL = 8, 24  # channels whose sums are pooled, and over how many draws


def arguments(shape, dtype, mask, training=True, wants=ALL, seed=0):
    """What bn_act's autograd formula passes: y only where a residual was added."""
    x, dy = images(*shape, dtype, scale=1.5, shift=0.7, seed=seed), images(*shape, dtype, seed=seed + 1)
    gamma, beta = vectors(shape[1], seed)
    relu = mask != "none"
    if training:
        mean, var = x.double().mean((0, 2, 3)).float(), x.double().var((0, 2, 3), unbiased=False).float()
    else:
        mean, var = torch.randn(shape[1]), torch.rand(shape[1]) + 0.1
    y = eager.fwd(x, gamma, beta, mean, var, dy.flip(0), False, 1e-5, relu)[0] if mask == "output" else None
    return dy, x, y, gamma, beta, mean, var, training, 1e-5, relu, list(wants)


def check(card, draw, seed=0):
    """The law for what the room makes of draw(seed). A sum over one channel errs by a single number, eager's too: sums of
    few channels that are outside at first are judged again, POOL more draws together."""
    found = compute(card, draw(seed=seed))
    judge([[one for one in found if one[0] not in SUMS]])
    try:
        judge([[one for one in found if one[0] in SUMS]])
    except AssertionError:
        if draw(seed=seed)[1].shape[1] > FEW:
            raise
        more = (compute(card, draw(seed=seed + 100 + i)) for i in range(POOL))
        judge([[one for one in found if one[0] in SUMS] for found in more])


def compute(card, call):
    """(name, ours, eager's, float64's, size of a sum's terms) of every gradient wanted."""
    dy, _, y, *_, wants = call
    got = card.run(room.bwd, *call)
    spec = eager.bwd(*call)
    exact = eager.bwd(*(t.double() if isinstance(t, torch.Tensor) else t for t in call))
    if call[-2] and y is None:  # the mask is the stored activation's, and where rounding decides it float64 cannot
        g = exact_mask(call) * dy.double()
        exact = eager.bwd(g, *(t.double() if isinstance(t, torch.Tensor) else t for t in call[1:-2]), False, wants)
    found = []
    for what, wanted, g, s, e in zip(("dx", "dweight", "dbias", "dresidual"), wants, got, spec, exact):
        if not wanted:
            assert g.numel() == 0, f"{what} was not wanted"
            continue
        assert g.stride() == s.stride()
        found.append((what, g, s, e, float(dy.abs().max()) * 8 if what in SUMS else float(e.abs().max())))
    return found


def judge(draws):
    for same in zip(*draws, strict=True):
        got, spec, exact = (torch.cat([one[i].flatten() for one in same]) for i in (1, 2, 3))
        size = torch.cat([torch.full((one[1].numel(),), one[4], dtype=torch.float64) for one in same])
        assert_lawful(got, spec, exact, same[0][0], size)


def exact_mask(call):
    """1 where the y that the forward stores is not <= 0: the room's own forward, whose values other tests prove."""
    _, x, _, gamma, beta, mean, var, *_ = call
    z = eager.fwd(x.float(), gamma, beta, mean, var, None, False, 1e-5, False)[0].to(x.dtype)
    return (~(z <= 0)).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(card, shape, mask, dtype):
    check(card, partial(arguments, shape, dtype, mask))
    assert card.names() == ["bn_backward_reduce", "bn_backward_finish", "bn_backward_apply"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_running_statistics(card, mask, dtype):
    for shape in SHAPES[:3]:
        check(card, partial(arguments, shape, dtype, mask, training=False))
    check(card, partial(arguments, SHAPES[0], dtype, mask, training=False, wants=[True, False, False, True]))
    assert card.names() == ["bn_backward_apply"], "without sums to make, one kernel"


@pytest.mark.parametrize("wants", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_subset_of_gradients(card, wants):
    for training in (True, False):
        check(card, partial(arguments, (2, 16, 5, 7), torch.float32, "output", training=training, wants=wants))


@pytest.mark.parametrize("relu", [False, True])
def test_mask_is_the_forwards(card, relu):
    """Where gradients flow, the stored output is not zero: also for values that only rounding makes zero."""
    x = images(2, 8, 9, 9, torch.float16, scale=1e-6, seed=3)
    mean, var = torch.zeros(8), torch.ones(8)
    y = card.run(room.fwd, x, None, None, mean, var, None, False, 0.0, True)[0]
    dy = torch.ones_like(y)
    dx = card.run(room.bwd, dy, x, None, None, None, mean, var, False, 0.0, relu, [True, False, False, False])[0]
    assert torch.equal(dx != 0, y != 0) if relu else bool((dx == 1).all())
    assert (y == 0).any() and (y != 0).any()


def test_nan_passes_the_mask_as_in_torch(card):
    call = arguments((1, 8, 4, 4), torch.float32, "output", training=False, wants=[True, False, False, True])
    call[2][0, 2, 1, 1] = float("nan")
    call[0][0, 3, 1, 1] = float("nan")
    call[1][0, 4, 1, 1] = float("nan")  # x is not needed here: its NaN must not reach dx
    got, spec = card.run(room.bwd, *call), eager.bwd(*call)
    assert torch.equal(got[3], spec[3]) or torch.equal(got[3].isnan(), spec[3].isnan())
    assert torch.equal(got[0].isnan(), spec[0].isnan())


@pytest.mark.parametrize("mask", MASKS)
def test_bytes_are_the_floor(card, mask):
    shape = (4, 64, 12, 12)
    size, vector = 4 * 64 * 12 * 12 * 2, 64 * 4
    card.run(room.bwd, *arguments(shape, torch.bfloat16, mask))
    reduce, finish, apply = (r.report.counters for r in card.ran)
    reads = 3 if mask == "output" else 2
    partials = reduce["distinct_write_bytes"]
    assert reduce["distinct_read_bytes"] == reads * size + 4 * vector
    assert partials <= 2 * card.sms * 2 * vector
    assert finish["distinct_read_bytes"] == partials + vector and finish["distinct_write_bytes"] == 2 * vector
    assert apply["distinct_read_bytes"] == reads * size + 6 * vector and apply["distinct_write_bytes"] == 2 * size
    for counters in (reduce, apply):  # every sector once, but for the vectors every block reads
        assert counters["global_load_sector_bytes"] <= reads * size + card.ran[0].grid * 8 * vector
    card.run(room.bwd, *arguments(shape, torch.bfloat16, mask, training=False, wants=[True, False, False, False]))
    reads = {"none": 1, "output": 2, "recompute": 2}[mask]
    assert card.bytes == (reads * size + 4 * vector, size)


@pytest.mark.proof
@pytest.mark.parametrize("sms", [1, 2, 7])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES, ids=str)
def test_on_many_cards(card, shape, mask, sms):
    card.sms = sms
    for card.order, dtype in zip((0, -1, 9), DTYPES):
        for training in (True, False):
            check(card, partial(arguments, shape, dtype, mask, training=training), sms)
