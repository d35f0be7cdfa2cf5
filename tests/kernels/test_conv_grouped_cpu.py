"""The compiled gradients of grouped convolutions, by the law of test_conv_backward_cpu.py, from NaN-filled memory."""

import pytest
import torch

pytest.importorskip("resnet_fast._C", reason="the compiled module is not there")

from resnet_fast import _C
from tests.kernels import test_conv_backward_cpu as dense
from tests.kernels.conv_cases import P1, Case

seed = dense.seed
DTYPES = dense.DTYPES
#: Whole groups in a vector, a vector cut by the last group, groups of several vectors; every way rows of taps lie.
EQUAL = [
    Case(2, 14, 14, 64, 64, 3, 3, groups=16, **P1),
    Case(3, 9, 7, 36, 36, 3, 3, groups=9, **P1),
    Case(2, 13, 11, 40, 40, 3, 3, groups=10, stride=(2, 2), **P1),
    Case(5, 7, 7, 32, 32, 3, 3, groups=4, **P1),
    Case(2, 28, 28, 24, 24, 3, 3, groups=3, stride=(2, 2), **P1),
    Case(2, 12, 9, 16, 16, 3, 3, groups=2, stride=(2, 1), **P1),
    Case(2, 12, 9, 16, 16, 3, 3, groups=4, stride=(1, 2), **P1),
    Case(3, 14, 14, 48, 48, 3, 3, groups=3, **P1),
    Case(3, 13, 15, 32, 32, 3, 3, groups=2, stride=(2, 2), **P1),
    Case(4, 7, 7, 64, 64, 3, 3, groups=2, **P1),
    Case(2, 14, 13, 96, 96, 3, 3, groups=3, stride=(2, 2), **P1),
    Case(2, 8, 9, 36, 36, 3, 3, groups=9, pad=(2, 2), dilation=(2, 2)),
    Case(2, 11, 12, 32, 32, 3, 3, groups=4, pad=(2, 2), dilation=(2, 2), stride=(2, 2)),
    Case(1, 12, 11, 32, 32, 5, 4, groups=8, pad=(2, 0), dilation=(1, 2), stride=(3, 2)),
    Case(2, 9, 9, 16, 16, 3, 3, groups=4, stride=(2, 2)),
    Case(2, 9, 8, 16, 16, 3, 3, groups=2, pad=(0, 4)),
    Case(2, 9, 10, 24, 24, 1, 1, groups=6, stride=(2, 2)),
    Case(2, 9, 10, 32, 32, 1, 1, groups=2),
    Case(2, 10, 9, 12, 12, 3, 3, groups=6, **P1),
    Case(2, 10, 9, 20, 20, 3, 3, groups=10, stride=(2, 2), **P1),
    Case(2, 10, 9, 20, 20, 3, 3, groups=20, **P1),
    Case(3, 11, 9, 32, 32, 3, 3, groups=32, stride=(2, 2), **P1),
    Case(1, 40, 70, 8, 8, 3, 3, groups=2, **P1),
    Case(40, 1, 1, 16, 16, 3, 3, groups=4, **P1),
    Case(1, 5, 5, 16, 16, 1, 1, groups=4, stride=(3, 3)),
]
#: Filters and channels that differ, panels cut by the group and whole ones.
OTHERS = [
    Case(2, 9, 7, 48, 34, 3, 3, groups=2, **P1),
    Case(2, 9, 7, 96, 48, 3, 3, groups=3, **P1),
    Case(2, 11, 9, 48, 34, 3, 3, groups=2, stride=(2, 2), **P1),
    Case(2, 11, 9, 102, 66, 3, 3, groups=3, stride=(2, 2), **P1),
]
CASES = EQUAL + OTHERS


def tensors(case, dtype):
    w = torch.randn(case.K, case.C // case.groups, case.R, case.S).to(dtype).float()
    return (
        dense.randn(case.N, case.K, *case.out, dtype=dtype),
        dense.randn(case.N, case.C, case.H, case.W, dtype=dtype),
        w,
    )


def reference(dy, x, w, case):
    window = (list(case.stride), list(case.pad), list(case.dilation), False, [0, 0], case.groups)
    return torch.ops.aten.convolution_backward(dy, x, w, None, *window, [True, True, False])[:2]


def ours(dy, x, w, case, threads=1):
    """dx and dw, each from memory full of NaN."""
    code, dx, dw = int(x.dtype == torch.bfloat16), torch.full_like(x, float("nan")), torch.full_like(w, float("nan"))
    assert _C.conv_dgrad_why_not(case.sizes, code) is None and _C.conv_wgrad_why_not(case.sizes, code) is None
    _C.conv_dgrad(case.sizes, code, dx.data_ptr(), dy.data_ptr(), w.data_ptr(), *w.stride(), threads)
    _C.conv_wgrad(case.sizes, code, dw.data_ptr(), *dw.stride(), dy.data_ptr(), x.data_ptr(), threads)
    return dx, dw


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype, layout):
    dy, x, w = tensors(case, dtype)
    w = w.contiguous(memory_format=layout)
    exact, eager = reference(dy.double(), x.double(), w.double(), case), reference(dy, x, w.to(dtype), case)
    dx, dw = ours(dy, x, w, case)
    dense.assert_close(dw, exact[1], eager[1], "dw")
    dense.assert_close(dx, exact[0], eager[0], "dx")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_for_any_thread_count(case, dtype):
    dy, x, w = tensors(case, dtype)
    first = ours(dy, x, w, case)
    for threads in (2, 3, 7, 16):
        assert all(torch.equal(a, b) for a, b in zip(first, ours(dy, x, w, case, threads))), threads


@pytest.mark.parametrize("case", EQUAL[:5], ids=str)
def test_sliced_weights(case):
    dy, x, w = tensors(case, torch.float32)
    wide = torch.randn(case.K, 40, 3, 3)
    part = wide[:, 20 : 20 + w.shape[1]]
    dx, dw = ours(dy, x, part.contiguous(), case)
    assert torch.equal(ours(dy, x, part, case)[0], dx)
    into = torch.full_like(wide, float("nan"))[:, 20 : 20 + w.shape[1]]
    _C.conv_wgrad(case.sizes, 0, into.data_ptr(), *into.stride(), dy.data_ptr(), x.data_ptr(), 1)
    assert torch.equal(into, dw)


@pytest.mark.parametrize(
    "case", [Case(1, 8, 8, 24, 24, 3, 3, groups=8, **P1), Case(1, 8, 8, 32, 64, 3, 3, groups=16, **P1)]
)
def test_narrow_groups_are_refused(case):
    assert "torch" in _C.conv_wgrad_why_not(case.sizes, 0) and "torch" in _C.conv_dgrad_why_not(case.sizes, 0)
