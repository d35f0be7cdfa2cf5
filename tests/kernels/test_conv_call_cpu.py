"""A convolution and its gradients in one call: the bits of the parts it is made of, each tested in a file of its own."""

import math

import pytest
import torch

pytest.importorskip("resnet_fast._C", reason="the compiled module is not there")

from resnet_fast import _C
from tests.kernels.conv_cases import CASES, DTYPES, NAMES, P1, Case, address, conv, inputs, nhwc

LARGE = [
    Case(2, 7, 7, 512, 512, 3, 3, **P1),  # filters packed a panel at a time
    Case(1, 14, 14, 600, 512, 3, 3, stride=(2, 2), **P1),  # memory of megabytes
    Case(1, 14, 14, 1100, 1024, 1, 1),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def whole(case: Case, x, w, scale=None, shift=None, residual=None, relu=False, exact=False, threads=1):
    y = torch.full((case.N, *case.out, case.K), math.nan, dtype=x.dtype)
    x, residual = nhwc(x), None if residual is None else nhwc(residual)
    place = (y.data_ptr(), x.data_ptr(), w.data_ptr(), w.stride())
    epilogue = (address(scale), address(shift), address(residual), relu)
    _C.conv_forward(case.sizes, DTYPES.index(x.dtype), *place, *epilogue, exact, threads)
    return y.permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_forward(case, dtype):
    """The heuristic's algorithm, with the scale in the filters where those are packed dense, else in the epilogue."""
    given, number = inputs(case, dtype), DTYPES.index(dtype)
    for exact, layout, scaled, threads in (
        (False, torch.channels_last, True, 2),
        (True, torch.contiguous_format, False, 1),
    ):
        config = _C.conv_heuristic(case.sizes, number, threads, exact)
        operands = {k: v for k, v in given.items() if scaled or k != "scale"} | {"relu": scaled}
        parts = dict(operands)
        if scaled and _C.conv_pack_strided_why_not(case.sizes, number, config[0]) is not None:
            parts["fold"] = parts.pop("scale")
        want = conv(case, config, **parts, threads=threads)
        operands["w"] = operands["w"].contiguous(memory_format=layout)
        assert torch.equal(whole(case, **operands, exact=exact, threads=threads), want)


def turned(case: Case) -> Case:
    """The convolution of dy that is the data gradient at stride 1."""
    pad = tuple(d * (r - 1) - p for d, r, p in zip(case.dilation, (case.R, case.S), case.pad))
    return Case(
        case.N, *case.out, case.K, case.C, case.R, case.S, pad=pad, dilation=case.dilation, groups=case.groups
    )  # fmt: skip


def data_gradient(case: Case, dy, w, residual=None, exact=False, threads=1):
    dx = torch.full((case.N, case.H, case.W, case.C), math.nan, dtype=dy.dtype)
    dy, residual = nhwc(dy), None if residual is None else nhwc(residual)
    place = (dx.data_ptr(), dy.data_ptr(), w.data_ptr(), w.stride(), address(residual))
    _C.conv_data_gradient(case.sizes, DTYPES.index(dy.dtype), *place, exact, threads)
    return dx.permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case", [c for c in [*CASES, *LARGE] if c.stride == (1, 1) and min(turned(c).pad) >= 0], ids=str
)
def test_data_gradient_at_stride_1(case, dtype):
    """The turned convolution; another gradient of the input is added to it, in float32 as by an addition after it."""
    back = turned(case)
    w = inputs(case, dtype)["w"]
    dy, other = torch.randn(case.N, case.K, *case.out).to(dtype), torch.randn(case.N, case.C, case.H, case.W).to(dtype)
    each = (case.groups, case.K // case.groups, case.C // case.groups, case.R, case.S)
    filters = w.reshape(each).transpose(1, 2).flip(3, 4).reshape(case.C, each[1], case.R, case.S).contiguous()
    for layout, exact in zip(LAYOUTS, (False, True)):
        given = w.contiguous(memory_format=layout)
        want = whole(back, dy, filters, exact=exact, threads=2)
        assert torch.equal(data_gradient(case, dy, given, exact=exact, threads=2), want)
        added = data_gradient(case, dy, given, other, exact, threads=2)
        if dtype == torch.float32:
            assert torch.equal(added, want + other)
        else:  # rounded once, not twice
            sum_ = want.float() + other.float()
            assert ((added.float() - sum_).abs() <= 2**-7 * (want.float().abs() + sum_.abs())).all()


#: Narrow groups of as many filters as channels, and wide ones: what the gradient kernels take of groups.
GROUPED = [c for c in CASES if c.groups > 1 and ((c.C == c.K and 16 % (c.C // c.groups) == 0) or c.C // c.groups >= 16)]
STRIDED = [c for c in CASES if (c.stride != (1, 1) or min(turned(c).pad) < 0) and (c.groups == 1 or c in GROUPED)] + [
    Case(2, 30, 30, 16, 24, 3, 3, stride=(2, 2), **P1),  # by Winograd
    LARGE[1],
]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_other_data_gradients(case, dtype, exact):
    """Other strides, and padding that reaches beyond the filter."""
    number, w = DTYPES.index(dtype), inputs(case, dtype)["w"].contiguous(memory_format=torch.channels_last)
    dy = torch.randn(case.N, case.K, *case.out).to(dtype)
    winograd = not exact and _C.conv_dgrad_winograd_why_not(case.sizes, number) is None
    want, last = torch.full((case.N, case.H, case.W, case.C), math.nan, dtype=dtype), nhwc(dy)
    kernel = _C.conv_dgrad_winograd if winograd else _C.conv_dgrad
    kernel(case.sizes, number, want.data_ptr(), last.data_ptr(), w.data_ptr(), *w.stride(), 2)
    assert torch.equal(data_gradient(case, dy, w, exact=exact, threads=2), want.permute(0, 3, 1, 2))
    assert "stride 1" in _C.conv_data_gradient_why_not(case.sizes, number, True)
    with pytest.raises(ValueError, match="stride 1 only"):
        data_gradient(case, dy, w, residual=torch.randn(case.N, case.C, case.H, case.W).to(dtype))


def weight_gradient(case: Case, dy, x, like, exact=False, threads=1):
    dw = torch.full_like(like, math.nan, dtype=torch.float32)
    dy, x = nhwc(dy), nhwc(x)
    place = (dw.data_ptr(), dw.stride(), dy.data_ptr(), x.data_ptr())
    return dw, _C.conv_weight_gradient(case.sizes, DTYPES.index(x.dtype), *place, exact, threads)


WEIGHTED = [c for c in CASES if c.groups == 1 or c in GROUPED]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", [*WEIGHTED, LARGE[0]], ids=str)
def test_weight_gradient(case, dtype, exact):
    given, number = inputs(case, dtype), DTYPES.index(dtype)
    dy, x, w = torch.randn(case.N, case.K, *case.out).to(dtype), given["x"], given["w"]
    faster = [] if exact else ["_winograd", "_stem"]
    able = [f for f in faster if getattr(_C, f"conv_wgrad{f}_why_not")(case.sizes, number) is None]
    kernel = getattr(_C, f"conv_wgrad{able[0]}" if able else "conv_wgrad")
    for layout in LAYOUTS:
        like = w.contiguous(memory_format=layout)
        want, last = torch.full_like(like, math.nan), (nhwc(dy), nhwc(x))
        kernel(case.sizes, number, want.data_ptr(), *want.stride(), last[0].data_ptr(), last[1].data_ptr(), 2)
        dw, finite = weight_gradient(case, dy, x, like, exact, threads=2)
        assert torch.equal(dw, want) and finite


@pytest.mark.parametrize(
    "case", [Case(2, 8, 7, 16, 24, 3, 3, **P1), Case(2, 8, 7, 16, 16, 3, 3, groups=4, **P1)], ids=str
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_what_is_not_finite_is_told(dtype, exact, value, case):
    """Wherever it is in dy or in a pixel of x that a tap reads; of 1x1 filters there is nothing to tell."""
    for _ in range(8):
        x, w = torch.randn(2, 16, 8, 7).to(dtype), torch.randn(case.K, 16 // case.groups, 3, 3)
        dy = torch.randn(2, case.K, *case.out).to(dtype)
        assert weight_gradient(case, dy, x, w, exact)[1]
        for tensor in (x, dy):
            at = tuple(int(torch.randint(size, (1,))) for size in tensor.shape)
            kept, tensor[at] = tensor[at].clone(), value
            assert not weight_gradient(case, dy, x, w, exact)[1], at
            tensor[at] = kept
    one = Case(2, 8, 7, 16, 24, 1, 1)
    x, dy = torch.full((2, 16, 8, 7), value).to(dtype), torch.randn(2, 24, 8, 7).to(dtype)
    dw, finite = weight_gradient(one, dy, x, torch.randn(24, 16, 1, 1), exact)
    assert finite and not dw.isfinite().any()


def test_algorithms_are_those_of_the_cases():
    """What the cases above run: every algorithm the heuristic chooses for some shape."""
    chosen = {
        NAMES[_C.conv_heuristic(case.sizes, dtype, 2, exact)[0]]
        for case in [*CASES, *LARGE]
        for dtype in (0, 1)
        for exact in (False, True)
    }
    assert {"direct", "winograd4", "winograd2", "grouped", "stem"} <= chosen, chosen
