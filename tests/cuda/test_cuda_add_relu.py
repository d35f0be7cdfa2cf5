"""add_relu's CUDA kernels, executed: values, tails, layouts, bytes."""

from __future__ import annotations

import pytest
import torch
from cuda_law import DTYPES, assert_lawful, images

from resnet_fast.ops.add_relu import cuda as room
from resnet_fast.ops.add_relu import eager

SIZES = [(1, 1, 1, 1), (1, 3, 5, 7), (2, 5, 9, 11), (1, 65, 3, 3), (3, 64, 7, 9), (2, 127, 5, 5)]


def exact(x, residual):
    return torch.relu(x.double() + residual.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_values(card, shape, dtype):
    x, residual = images(*shape, dtype, seed=1), images(*shape, dtype, seed=2)
    if x.numel() > 8:
        x[0, 0, 0, 0], residual[-1, -1, -1, -1] = float("nan"), float("-inf")
    y = card.run(room.fwd, x, residual)
    assert_lawful(y, eager.fwd(x, residual), exact(x, residual), "y")
    assert y.stride() == eager.fwd(x, residual).stride()
    size = x.numel() * x.element_size()
    assert card.bytes == (2 * size, size)
    dy = images(*shape, dtype, seed=3)
    dx = card.run(room.bwd, dy, y)
    torch.testing.assert_close(dx, eager.bwd(dy, y), rtol=0, atol=0, equal_nan=True)
    assert card.bytes == (2 * size, size)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded", "misaligned"])
def test_layouts(card, layout):
    x, residual = images(4, 6, 5, 5, seed=4), images(2, 6, 5, 5, seed=5)
    x = {
        "contiguous": x[:2].contiguous(),
        "sliced": x[::2],
        "expanded": torch.tensor(0.25).expand(2, 6, 5, 5),
        "misaligned": torch.randn(2 * 5 * 5 * 6 + 1)[1:].view(2, 5, 5, 6).permute(0, 3, 1, 2),
    }[layout]
    y = card.run(room.fwd, x, residual)
    torch.testing.assert_close(y, eager.fwd(x, residual), rtol=0, atol=0)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_every_order_of_warps_gives_the_same_bits(card):
    x, residual = images(2, 24, 15, 15, torch.bfloat16, seed=6), images(2, 24, 15, 15, torch.bfloat16, seed=7)
    results = []
    for card.order in (0, -1, 3, 11):
        results.append(card.run(room.fwd, x, residual))
    assert all(torch.equal(r, results[0]) for r in results)
    assert len(card.ran) == 1 and card.ran[0].grid > 1
