"""The compiled add_relu against torch: the same bits in float32, one rounding where torch has two in bfloat16."""

from __future__ import annotations

import pytest
import torch

from resnet_fast import _C

DTYPES = [torch.float32, torch.bfloat16]


def values(n: int, dtype: torch.dtype) -> torch.Tensor:
    t = torch.randn(n)
    t[::7] = 0
    t[5::31] = float("nan")
    t[6::37] = float("inf")
    t[8::41] = float("-inf")
    return t.to(dtype)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 100, 4099, 70000])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_both_directions(n, dtype, threads):
    torch.manual_seed(n)
    x, residual, dy = values(n, dtype), values(n, dtype).flip(0), values(n, dtype)
    y, dx = (torch.full((n,), float("nan"), dtype=dtype) for _ in range(2))
    code = int(dtype == torch.bfloat16)
    _C.add_relu(code, y.data_ptr(), x.data_ptr(), residual.data_ptr(), n, threads)
    assert equal(y, torch.relu(x.float() + residual.float()).to(dtype))
    _C.add_relu_backward(code, dx.data_ptr(), dy.data_ptr(), y.data_ptr(), n, threads)
    assert equal(dx, torch.ops.aten.threshold_backward(dy, y, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype):
    x, residual = values(5000, dtype), values(5000, dtype)
    wanted = torch.relu(x.float() + residual.float()).to(dtype)
    _C.add_relu(int(dtype == torch.bfloat16), x.data_ptr(), x.data_ptr(), residual.data_ptr(), 5000, 2)
    assert equal(x, wanted)
