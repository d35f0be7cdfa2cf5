"""max_pool2d's CUDA kernels, executed: values and places, every window, bytes."""

from __future__ import annotations

import pytest
import torch
from cuda_law import DTYPES, assert_lawful, images

from resnet_fast.ops.max_pool2d import cuda as room
from resnet_fast.ops.max_pool2d import eager
from resnet_fast.ops.max_pool2d.op import output_size

# kernel, stride, padding, dilation, ceil_mode
STEM = ((3, 3), (2, 2), (1, 1), (1, 1), False)
WINDOWS = [
    STEM,
    ((2, 2), (2, 2), (0, 0), (1, 1), True),
    ((3, 2), (1, 3), (1, 0), (2, 1), False),
    ((5, 3), (2, 1), (2, 1), (1, 2), True),
    ((3, 3), (1, 1), (1, 1), (1, 1), False),
    ((1, 1), (2, 2), (0, 0), (1, 1), False),
]
SHAPES = [(2, 8, 9, 11), (1, 3, 7, 8), (1, 64, 12, 12), (2, 65, 8, 7), (1, 1, 13, 9)]


def call_of(x, window):
    kernel, stride, padding, dilation, ceil_mode = window
    size = output_size(x, kernel, stride, padding, dilation, ceil_mode)
    return list(kernel), list(stride), list(padding), list(dilation), size


def check(card, x, window, dy_seed=5):
    call = call_of(x, window)
    y, places = card.run(room.fwd, x, *call, True)
    spec_y, spec_places = eager.fwd(x, *call, True)
    torch.testing.assert_close(y, spec_y, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(places, spec_places) and places.stride() == spec_places.stride()
    dy = images(*y.shape, x.dtype, seed=dy_seed)
    back = (x.shape[2], x.shape[3], *call[:4])
    dx = card.run(room.bwd, dy, places, *back)
    spec_dx, exact = eager.bwd(dy, places, *back), eager.bwd(dy.double(), places, *back)
    assert_lawful(dx, spec_dx, exact, "dx")
    assert dx.stride() == spec_dx.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_values(card, window, dtype):
    for shape in SHAPES[:2]:
        x = images(*shape, dtype, seed=1)
        x.mul_(2).round_()  # ties
        check(card, x, window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(card, shape, dtype):
    check(card, images(*shape, dtype, seed=2), STEM)


def test_nan_and_infinity(card):
    x = images(1, 8, 9, 9, seed=3)
    x[0, 1, 4, 4], x[0, 1, 5, 5], x[0, 2] = float("nan"), float("nan"), float("-inf")
    x[0, 3, 2, 2], x[0, 4] = float("inf"), float("nan")
    for window in (STEM, ((2, 2), (2, 2), (0, 0), (1, 1), False)):
        call = call_of(x, window)
        y, places = card.run(room.fwd, x, *call, True)
        spec_y, spec_places = eager.fwd(x, *call, True)
        torch.testing.assert_close(y, spec_y, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(places, spec_places)


def test_without_places(card):
    x = images(1, 16, 7, 7, torch.bfloat16, seed=4)
    y, places = card.run(room.fwd, x, *call_of(x, STEM), False)
    assert torch.equal(y, eager.fwd(x, *call_of(x, STEM), False)[0]) and places.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_the_floor(card, dtype):
    x = images(2, 64, 14, 14, dtype, seed=9)
    call = call_of(x, STEM)
    size = x.numel() * x.element_size()
    y, places = card.run(room.fwd, x, *call, True)
    out = y.numel() * y.element_size()
    assert card.bytes == (size, out + places.numel())
    dx = card.run(room.bwd, torch.ones_like(y), places, 14, 14, *call[:4])
    assert card.bytes == (out + places.numel(), dx.numel() * dx.element_size())


@pytest.mark.proof
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows_by_shapes(card, window, dtype):
    for card.order, shape in enumerate([*SHAPES, (1, 127, 10, 10), (3, 24, 15, 6), (8, 8, 8, 8)]):
        check(card, images(*shape, dtype, seed=card.order), window)
