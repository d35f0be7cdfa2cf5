"""The compiled gradients of conv2d against float64: at most twice eager's error in the same dtype plus one rounding.

Outputs are filled with NaN first, so that anything left unwritten shows.
"""

from __future__ import annotations

import pytest
import torch

from resnet_fast import _C

DTYPES = [torch.float32, torch.bfloat16]
# N, C, H, W, K, filter, stride, padding, dilation
CASES = [
    (2, 64, 14, 14, 64, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 32, 9, 7, 45, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 48, 14, 14, 70, (1, 1), (2, 2), (0, 0), (1, 1)),
    (2, 65, 14, 13, 33, (3, 3), (2, 2), (1, 1), (1, 1)),
    (70, 16, 2, 2, 24, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 40, 30, 31, 16, (3, 3), (1, 1), (2, 2), (2, 2)),
    (2, 9, 11, 12, 5, (5, 3), (3, 2), (2, 0), (1, 2)),
    (5, 33, 7, 7, 130, (2, 4), (2, 1), (0, 3), (1, 1)),
    (1, 8, 5, 5, 1, (1, 1), (3, 3), (0, 0), (1, 1)),
    (2, 8, 6, 6, 16, (1, 1), (1, 1), (1, 1), (1, 1)),
    (1, 24, 60, 500, 20, (3, 3), (1, 1), (1, 1), (1, 1)),
    (600, 24, 1, 1, 20, (1, 1), (1, 1), (0, 0), (1, 1)),
    (130, 24, 1, 1, 20, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 3, 33, 31, 40, (7, 7), (2, 2), (3, 3), (1, 1)),
    (2, 64, 15, 13, 160, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 160, 15, 13, 65, (1, 1), (1, 1), (0, 0), (1, 1)),
    (3, 64, 15, 13, 64, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 45, 16, 13, 96, (1, 1), (2, 2), (0, 0), (1, 1)),
]
# Winograd's: N, C, H, W, K, padding, stride; tiles cut by the border, one and several blocks, channels that fill no
# panel, every kind of last tile
WINOGRAD = [
    (2, 64, 14, 14, 64, (1, 1), 1),
    (3, 45, 9, 7, 33, (1, 1), 1),
    (1, 16, 3, 4, 16, (0, 1), 1),
    (70, 17, 2, 2, 24, (1, 1), 1),
    (1, 40, 30, 31, 130, (2, 0), 1),
    (2, 32, 57, 91, 16, (1, 1), 1),
    (9, 48, 18, 15, 40, (1, 1), 1),
    (2, 64, 28, 28, 48, (1, 1), 2),
    (3, 45, 13, 14, 33, (1, 1), 2),
    (5, 17, 21, 19, 24, (1, 1), 2),
    (1, 16, 3, 4, 16, (0, 1), 2),
    (70, 17, 2, 2, 24, (1, 1), 2),
    (9, 40, 56, 30, 70, (1, 1), 2),
]


@pytest.fixture(autouse=True)
def seed():
    """Same draws each run; torch's own part on one thread, since ours are passed their count."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)


def tensors(case, dtype):
    n, c, h, w, k, filters, stride, padding, dilation = case
    size = [(i + 2 * p - d * (f - 1) - 1) // s + 1 for i, f, s, p, d in zip((h, w), filters, stride, padding, dilation)]
    return randn(n, k, *size, dtype=dtype), randn(n, c, h, w, dtype=dtype), randn(k, c, *filters)


def reference(dy, x, w, case):
    stride, padding, dilation = (list(v) for v in case[6:])
    options = (stride, padding, dilation, False, [0, 0], 1, [True, True, False])
    return torch.ops.aten.convolution_backward(dy, x, w, None, *options)[:2]


def sizes(dy, x, case):
    n, c, h, w, k, filters, stride, padding, dilation = case
    return [n, h, w, c, k, *filters, *dy.shape[2:], *stride, *padding, *dilation, 1]


def strides(w):
    k, c, r, s = w.stride()
    return [k, c, r, s]


def wgrad(dy, x, w, case, threads=1):
    dw = torch.full_like(w, float("nan"))
    code = int(x.dtype == torch.bfloat16)
    assert _C.conv_wgrad_why_not(sizes(dy, x, case), code) is None
    _C.conv_wgrad(sizes(dy, x, case), code, dw.data_ptr(), *strides(dw), dy.data_ptr(), x.data_ptr(), threads)
    return dw


def wgrad_winograd(dy, x, w, case, threads=1):
    dw = torch.full_like(w, float("nan"))
    code = int(x.dtype == torch.bfloat16)
    assert _C.conv_wgrad_winograd_why_not(sizes(dy, x, case), code) is None
    _C.conv_wgrad_winograd(sizes(dy, x, case), code, dw.data_ptr(), *strides(dw), dy.data_ptr(), x.data_ptr(), threads)
    return dw


def dgrad(dy, x, w, case, threads=1, kernel="dgrad"):
    dx = torch.full_like(x, float("nan"))
    code = int(x.dtype == torch.bfloat16)
    assert getattr(_C, f"conv_{kernel}_why_not")(sizes(dy, x, case), code) is None
    place = (dx.data_ptr(), dy.data_ptr(), w.data_ptr(), *strides(w), threads)
    getattr(_C, f"conv_{kernel}")(sizes(dy, x, case), code, *place)
    return dx


def assert_close(got, exact, eager, what):
    assert not got.isnan().any(), f"{what}: NaN"
    rounding = torch.finfo(eager.dtype).eps * exact.abs().max().item()
    # oneDNN's bfloat16 gradient of a dilated filter has been seen to hold NaN: no error of its own is granted there.
    eagers = (eager.double() - exact).abs().max().nan_to_num(0.0).item()
    error, allowed = (got.double() - exact).abs().max().item(), 2 * eagers + rounding
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype, layout):
    dy, x, w = tensors(case, dtype)
    w = w.to(dtype).float().contiguous(memory_format=layout)
    exact = reference(dy.double(), x.double(), w.double(), case)
    eager = reference(dy, x, w.to(dtype), case)
    assert_close(wgrad(dy, x, w, case), exact[1], eager[1], "dw")
    assert_close(dgrad(dy, x, w, case), exact[0], eager[0], "dx")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[:5] + CASES[-4:], ids=str)
def test_same_bits_for_any_thread_count(case, dtype):
    dy, x, w = tensors(case, dtype)
    first = None
    for threads in (1, 2, 3, 7, 16):
        out = wgrad(dy, x, w, case, threads), dgrad(dy, x, w, case, threads)
        first = first or out
        assert all(torch.equal(a, b) for a, b in zip(first, out)), threads


#: So many pixels to so small a filter that parts of them are summed apart: one operand packed or the other, both, and taps.
DEEP = [
    (4, 32, 56, 56, 48, (1, 1), (1, 1), (0, 0), (1, 1)),
    (4, 48, 56, 56, 64, (1, 1), (1, 1), (0, 0), (1, 1)),
    (5, 40, 53, 51, 24, (1, 1), (1, 1), (0, 0), (1, 1)),
    (4, 16, 57, 56, 16, (3, 3), (1, 1), (1, 1), (1, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DEEP, ids=str)
def test_deep_weight_gradients(case, dtype):
    """By the law, and the same bits for any team, larger ones than there are parts too."""
    dy, x, w = tensors(case, dtype)
    w = w.to(dtype).float()
    first = wgrad(dy, x, w, case)
    assert_close(
        first, reference(dy.double(), x.double(), w.double(), case)[1], reference(dy, x, w.to(dtype), case)[1], "dw"
    )
    for threads in (2, 3, 7, 40):
        assert torch.equal(wgrad(dy, x, w, case, threads), first), threads


def winograd_case(given):
    return (*given[:5], (3, 3), (given[6],) * 2, given[5], (1, 1))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", WINOGRAD, ids=str)
def test_winograd_weight_gradient(given, dtype, layout):
    """In float32 whatever the tensors: rms error at most 3e-6 of the gradient's rms (1.4e-6 measured)."""
    case = winograd_case(given)
    dy, x, w = tensors(case, dtype)
    if case[6] == (2, 2) and dtype == torch.bfloat16:
        assert "pairs" in _C.conv_wgrad_winograd_why_not(sizes(dy, x, case), 1)
        return
    w = w.contiguous(memory_format=layout)
    exact = reference(dy.double(), x.double(), w.double(), case)[1]
    first = wgrad_winograd(dy, x, w, case)
    assert not first.isnan().any()
    assert ((first.double() - exact).norm() / exact.norm()).item() <= 3e-6
    for threads in (2, 3, 7):
        assert torch.equal(wgrad_winograd(dy, x, w, case, threads), first), threads


@pytest.mark.parametrize(
    ("change", "reason"),
    [((5, 1), "3x3"), ((9, 2), "stride"), ((13, 2), "dilation"), ((15, 2), "groups"), ((3, 8), "16 channels")],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_winograd_weight_gradient_refuses(change, reason):
    shape = [1, 8, 8, 32, 32, 3, 3, 8, 8, 1, 1, 1, 1, 1, 1, 1]
    shape[change[0]] = change[1]
    assert reason in _C.conv_wgrad_winograd_why_not(shape, 0)


# Stride 2; every kind of last tile, and 96 tiles at least
STRIDED = [
    (6, 64, 28, 28, 48, (1, 1), 2),
    (24, 45, 13, 14, 33, (1, 1), 2),
    (12, 17, 21, 19, 24, (1, 1), 2),
    (9, 40, 56, 30, 70, (1, 1), 2),
    (100, 16, 3, 4, 20, (1, 1), 2),
    (2, 150, 60, 56, 130, (1, 1), 2),
]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("given", STRIDED, ids=str)
def test_winograd_data_gradient(given, layout):
    """float32: rms error at most 2.5 times eager's (1.1 to 2.0 measured)."""
    case = winograd_case(given)
    dy, x, w = tensors(case, torch.float32)
    w = w.contiguous(memory_format=layout)
    exact = reference(dy.double(), x.double(), w.double(), case)[0]
    eager = reference(dy, x, w, case)[0]
    first = dgrad(dy, x, w, case, kernel="dgrad_winograd")
    assert not first.isnan().any()
    assert (first.double() - exact).norm().item() <= 2.5 * (eager.double() - exact).norm().item()
    for threads in (2, 3, 7):
        assert torch.equal(dgrad(dy, x, w, case, threads, "dgrad_winograd"), first), threads


@pytest.mark.parametrize(
    ("change", "reason"),
    [((5, 1), "3x3"), ((9, 1), "stride 2"), ((11, 0), "padding 1"), ((13, 2), "dilation"), ((15, 2), "groups"),
     ((4, 8), "16 channels"), ((0, 20), "few pixels")],
    ids=lambda v: v if isinstance(v, str) else None,
)  # fmt: skip
def test_winograd_data_gradient_refuses(change, reason):
    shape = [100, 8, 8, 32, 32, 3, 3, 4, 4, 2, 2, 1, 1, 1, 1, 1]
    assert _C.conv_dgrad_winograd_why_not(shape, 0) is None
    assert "float32" in _C.conv_dgrad_winograd_why_not(shape, 1)
    shape[change[0]] = change[1]
    assert reason in _C.conv_dgrad_winograd_why_not(shape, 0)


def aligned(size: int) -> torch.Tensor:
    """NaN-filled bytes whose address is a multiple of 64."""
    raw = torch.full((size // 4 + 32,), float("nan"))
    skip = -raw.data_ptr() % 64 // 4
    return raw[skip : skip + size // 4]


def pack_pair(sizes, algorithm, dense, wanted_strides, address, threads, dtype=0):
    """The packed bytes of dense filters by conv_pack and of the strided ones."""
    size = _C.conv_packed_bytes(sizes, dtype, algorithm)
    a, b = aligned(size), aligned(size)
    _C.conv_pack(sizes, dtype, algorithm, a.data_ptr(), dense.data_ptr(), 0, 1)
    _C.conv_pack_strided(sizes, algorithm, b.data_ptr(), address, *wanted_strides, threads, dtype)
    view = torch.bfloat16 if dtype and _C.isa() == "avx512_bf16" else torch.float32  # -0 is 0
    return a.view(view), b.view(view)


@pytest.mark.parametrize("channels", [(64, 64), (45, 33), (16, 130), (256, 256)], ids=str)
@pytest.mark.parametrize("name", ["direct", "winograd2", "winograd4", "winograd4x2", "winograd4_strided"])
def test_strided_packing_has_conv_packs_bits(name, channels):
    """Forward and exchanged filters, channels_last and contiguous."""
    algorithm = _C.conv_algorithms().index(name)
    k, c = channels
    for layout in (torch.channels_last, torch.contiguous_format):
        w = torch.randn(k, c, 3, 3).contiguous(memory_format=layout)
        sk, sc, sr, ss = w.stride()
        p, step = (4, 2) if name == "winograd4_strided" else (8, 1)
        forward = [1, 8, 8, c, k, 3, 3, p, p, step, step, 1, 1, 1, 1, 1]
        backward = [1, 8, 8, k, c, 3, 3, p, p, step, step, 1, 1, 1, 1, 1]
        able = [dtype for dtype in (0, 1) if _C.conv_pack_strided_why_not(forward, dtype, algorithm) is None]
        pairs = c % 2 == 0 or _C.isa() != "avx512_bf16"  # elsewhere bf16 filters are packed as floats
        assert (0 in able) == (name != "winograd4x2") and (1 in able) == (name != "winograd4" and pairs)
        for threads in (1, 3):
            for dtype in able:
                a, b = pack_pair(forward, algorithm, w.contiguous(), (sk, sc, sr, ss), w.data_ptr(), threads, dtype)
                assert not a.isnan().any() and torch.equal(a, b)
                if _C.conv_pack_strided_why_not(backward, dtype, algorithm) is None:
                    flipped = w.transpose(0, 1).flip(2, 3).contiguous()
                    last = w.data_ptr() + 4 * (2 * sr + 2 * ss)
                    a, b = pack_pair(backward, algorithm, flipped, (sc, sk, -sr, -ss), last, threads, dtype)
                    assert not a.isnan().any() and torch.equal(a, b)


@pytest.mark.parametrize("name", ["direct", "winograd2", "winograd4"])
def test_data_gradient_by_a_convolution(name):
    """dgrad of stride 1 as a convolution of dy by the exchanged, reversed filters."""
    case = (2, 64, 14, 14, 48, (3, 3), (1, 1), (1, 1), (1, 1))
    dy, x, w = tensors(case, torch.float32)
    sk, sc, sr, ss = w.stride()
    algorithm = _C.conv_algorithms().index(name)
    shape = [2, 14, 14, 48, 64, 3, 3, 14, 14, 1, 1, 1, 1, 1, 1, 1]
    packed, dx = aligned(_C.conv_packed_bytes(shape, 0, algorithm)), torch.full_like(x, float("nan"))
    _C.conv_pack_strided(shape, algorithm, packed.data_ptr(), w.data_ptr() + 4 * (2 * sr + 2 * ss), sc, sk, -sr, -ss, 2)
    config = (algorithm, 0, 0, 0)
    scratch = aligned(_C.conv_scratch_bytes(shape, 0, config, 2))
    _C.conv_run(
        shape, 0, config, dx.data_ptr(), dy.data_ptr(), packed.data_ptr(), 0, 0, 0, False, scratch.data_ptr(), 2
    )
    exact = reference(dy.double(), x.double(), w.double(), case)[0]
    assert ((dx.double() - exact).abs().max() / exact.abs().max()).item() <= 3e-6


STREAMED = [
    ("winograd4", DTYPES[0]), ("winograd2", DTYPES[1]), ("winograd4x2", DTYPES[1]),
    ("winograd4_strided", DTYPES[0]), ("winograd4_strided", DTYPES[1]),
]  # fmt: skip


@pytest.mark.parametrize("name,dtype", STREAMED)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("given", [(2, 488, 7, 7, 520), (1, 600, 9, 10, 450)], ids=str)
def test_filters_packed_a_panel_at_a_time(given, layout, name, dtype):
    """The bits of packing them whole: shift, residual and ReLU too, for any number of threads, from NaN-filled scratch."""
    n, c, h, w, k = given
    number = DTYPES.index(dtype)
    step = 2 if name == "winograd4_strided" else 1
    p, q = (h + step - 1) // step, (w + step - 1) // step
    algorithm, shape = _C.conv_algorithms().index(name), [n, h, w, c, k, 3, 3, p, q, step, step, 1, 1, 1, 1, 1]
    x = randn(n, c, h, w, dtype=dtype).to(memory_format=torch.channels_last)
    filters, shift = torch.randn(k, c, 3, 3).contiguous(memory_format=layout), torch.randn(k)
    residual = randn(n, k, p, q, dtype=dtype).to(memory_format=torch.channels_last)
    packed = aligned(_C.conv_packed_bytes(shape, number, algorithm))
    _C.conv_pack_strided(shape, algorithm, packed.data_ptr(), filters.data_ptr(), *filters.stride(), 2, number)
    config = (algorithm, 0, 0, 0)
    scratch, want = aligned(_C.conv_scratch_bytes(shape, number, config, 1)), torch.empty_like(residual)
    epilogue = (shift.data_ptr(), residual.data_ptr(), True)
    place = (want.data_ptr(), x.data_ptr(), packed.data_ptr(), 0)
    _C.conv_run(shape, number, config, *place, *epilogue, scratch.data_ptr(), 1)
    for threads in (1, 2, 3):
        size = _C.conv_streamed_scratch_bytes(shape, number, algorithm, threads)
        assert 0 < size < packed.nbytes
        got, scratch = torch.full_like(want, float("nan")), aligned(size)
        place = (got.data_ptr(), x.data_ptr(), filters.data_ptr(), *filters.stride())
        _C.conv_run_streamed(shape, number, algorithm, *place, *epilogue, scratch.data_ptr(), threads)
        assert torch.equal(got, want)


def test_what_is_packed_whole():
    winograd, direct = (_C.conv_algorithms().index(name) for name in ("winograd4", "direct"))
    for shape, algorithm in (
        ([16, 14, 14, 256, 256, 3, 3, 14, 14, 1, 1, 1, 1, 1, 1, 1], winograd),  # more tiles than filters
        ([1, 7, 7, 128, 128, 3, 3, 7, 7, 1, 1, 1, 1, 1, 1, 1], winograd),  # in the caches either way
        ([16, 7, 7, 512, 512, 3, 3, 7, 7, 1, 1, 1, 1, 1, 1, 1], direct),
        ([16, 7, 7, 512, 512, 3, 3, 7, 7, 1, 1, 1, 1, 1, 1, 4], winograd),
    ):
        assert _C.conv_streamed_scratch_bytes(shape, 0, algorithm, 2) == 0


def test_packing_of_other_kinds_is_refused():
    shape = [1, 8, 8, 32, 32, 3, 3, 8, 8, 1, 1, 1, 1, 1, 1, 1]
    if _C.isa() == "avx512_bf16":
        assert "even" in _C.conv_pack_strided_why_not([*shape[:3], 31, *shape[4:]], 1, 0)
    assert "groups" in _C.conv_pack_strided_why_not([*shape[:15], 4], 0, _C.conv_algorithms().index("winograd2"))
    stem = [1, 16, 16, 3, 32, 7, 7, 8, 8, 2, 2, 3, 3, 1, 1, 1]
    for algorithm, name in enumerate(_C.conv_algorithms()):
        if name != "direct" and _C.conv_why_not(stem, 0, algorithm) is None:
            assert "3x3" in _C.conv_pack_strided_why_not(stem, 0, algorithm), name


def test_sliced_weights():
    dy, x, _ = tensors(CASES[0], torch.float32)
    wide = torch.randn(64, 100, 3, 3)
    part = wide[:, 20:84]
    assert torch.equal(dgrad(dy, x, part, CASES[0]), dgrad(dy, x, part.contiguous(), CASES[0]))
