"""The compiled max pool against torch's: equal values, equal winners, equal gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resnet_fast import _C

DTYPES = [torch.float32, torch.bfloat16]
# shape, kernel, stride, padding, dilation, ceil_mode
CASES = [
    ((2, 64, 12, 12), 3, 2, 1, 1, False),
    ((1, 3, 7, 9), 3, 2, 1, 1, True),
    ((3, 5, 8, 8), 2, 2, 0, 1, False),
    ((2, 65, 11, 6), (3, 2), (2, 1), (1, 0), (2, 1), False),
    ((1, 127, 10, 10), 3, 1, 1, 1, False),
    ((2, 1, 9, 9), 5, 3, 2, 2, True),
    ((1, 16, 13, 13), 15, 7, 7, 1, False),
    ((2, 33, 6, 6), 2, 3, 1, 1, True),
    ((1, 8, 3, 3), 3, 4, 0, 1, False),
]


@pytest.fixture(autouse=True)
def seed():
    """Same draws each run; torch's own part on one thread, since ours are passed their count."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def output(x, case):
    """torch's values and flat indices."""
    _, kernel, stride, padding, dilation, ceil_mode = case
    return F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode, return_indices=True)


def sizes(x, y, case):
    pair = lambda v: (v, v) if isinstance(v, int) else v
    n, c, h, w = x.shape
    return (n, h, w, c, *y.shape[2:], *(v for option in case[1:5] for v in pair(option)))


def pool(x, y, case, save=True, threads=1):
    out = torch.full_like(y, float("nan"))
    argmax = torch.full(y.shape, 255, dtype=torch.uint8).to(memory_format=torch.channels_last) if save else None
    _C.max_pool_forward(
        int(x.dtype == torch.bfloat16),
        out.data_ptr(),
        argmax.data_ptr() if save else 0,
        x.data_ptr(),
        *sizes(x, y, case),
        threads,
    )
    return out, argmax


def pool_backward(dy, argmax, x, case, threads=1):
    dx = torch.full_like(x, float("nan"))
    _C.max_pool_backward(
        int(x.dtype == torch.bfloat16), dx.data_ptr(), dy.data_ptr(), argmax.data_ptr(), *sizes(x, dy, case), threads
    )
    return dx


def flat_index(argmax, x, case):
    """torch's index from ours."""
    _, _, w, _, p, q, _, s, sh, sw, ph, pw, dh, dw = sizes(x, argmax, case)
    place = argmax.long()
    row = torch.arange(p)[:, None] * sh - ph + place // s * dh
    return row * w + torch.arange(q) * sw - pw + place % s * dw


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_torch(case, dtype):
    for kind in ("normal", "ties", "nan", "-inf"):
        x = torch.randn(case[0])
        if kind == "ties":
            x = x.round().clamp(min=0)
        if kind == "nan":
            x[torch.rand(x.shape) < 0.1] = float("nan")
        if kind == "-inf":
            x[torch.rand(x.shape) < 0.9] = float("-inf")
        x = x.to(dtype).to(memory_format=torch.channels_last)
        y, index = output(x, case)
        got, argmax = pool(x, y, case)
        assert torch.equal(got.nan_to_num(7.5), y.nan_to_num(7.5)), kind
        assert torch.equal(flat_index(argmax, x, case), index), kind
        assert torch.equal(pool(x, y, case, save=False)[0].nan_to_num(7.5), y.nan_to_num(7.5)), kind
        dy = torch.randn(y.shape).to(dtype).to(memory_format=torch.channels_last)
        exact = torch.zeros(*x.shape[:2], x.shape[2] * x.shape[3], dtype=torch.float64)
        exact = exact.scatter_add(2, index.flatten(2), dy.double().flatten(2)).view(x.shape)
        dx = pool_backward(dy, argmax, x, case)
        tolerance = torch.finfo(dtype).eps * exact.abs() + 1e-6
        assert ((dx.double() - exact).abs() <= tolerance).all(), kind


def test_same_bits_for_any_thread_count():
    case = ((5, 40, 17, 17), 3, 2, 1, 1, False)
    x = torch.randn(case[0]).to(memory_format=torch.channels_last)
    y, _ = output(x, case)
    dy = torch.randn_like(y)
    first = None
    for threads in (1, 2, 3, 7, 16):
        got, argmax = pool(x, y, case, threads=threads)
        out = [got, argmax, pool_backward(dy, argmax, x, case, threads)]
        first = first or out
        assert all(torch.equal(a, b) for a, b in zip(first, out)), threads
