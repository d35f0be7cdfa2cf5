"""What is Strassen's own: its error on images as they are, whose pixels are summed, what decides that it runs.

Values on many shapes, blocks, threads, NaN: test_conv_cpu.py, as for every algorithm.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("resnet_fast._C", reason="the compiled module is not there")

from resnet_fast import _C
from tests.kernels.conv_cases import NAMES, Case, aligned, conv, default, inputs, nhwc, reference, rms

STRASSEN = NAMES.index("strassen")
FORMATS, EPS = (torch.contiguous_format, torch.channels_last), torch.finfo(torch.float32).eps


def smooth(x):
    """Neighbouring pixels alike, as in an image."""
    return torch.nn.functional.avg_pool2d(x, 5, 1, 2) * 5


def scaled(x, by):
    return x * by.view(1, -1, 1, 1)


#: And the bound: the package's law, or where half of the channels are much larger than those they meet, what was stated.
INPUTS = {
    "normal": (lambda x: x, 2.0),
    "behind a ReLU": (torch.relu, 2.0),
    "smooth": (smooth, 2.0),
    "smooth and behind a ReLU": (lambda x: smooth(x).relu(), 2.0),
    "far from 0": (lambda x: x + 10, 2.0),
    "channels of unlike size": (lambda x: scaled(x, 10.0 ** (2 * torch.rand(x.shape[1]))), 2.0),
    "second half larger": (lambda x: scaled(x, torch.logspace(-2, 2, x.shape[1])), 3.0),
    "first half larger": (lambda x: scaled(x, torch.logspace(2, -2, x.shape[1])), 3.0),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("case", [Case(2, 14, 14, c, 128, 1, 1) for c in (64, 256, 1024)], ids=str)
def test_rms_error(case, kind):
    draw, bound = INPUTS[kind]
    own = eager = size = 0.0
    for _ in range(3):
        drawn = inputs(case, torch.float32)
        operands = {"x": draw(drawn["x"]), "w": drawn["w"]}

        def in_format(memory_format, operands=operands):
            return {k: v.contiguous(memory_format=memory_format) for k, v in operands.items()}

        truth = reference(case, torch.float64, **operands)
        own += rms(conv(case, default(STRASSEN), **operands).double() - truth) ** 2
        eager += max(rms(reference(case, torch.float32, **in_format(f)).double() - truth) for f in FORMATS) ** 2
        size += rms(truth) ** 2
    print(f"{kind}: {(own / eager) ** 0.5:.2f} times eager's error")
    assert own**0.5 <= bound * eager**0.5 + EPS / 2 * size**0.5


@pytest.mark.parametrize("size", [(7, 7), (5, 4), (1, 3)], ids=str)
def test_an_image_does_not_depend_on_the_others(size):
    case = Case(6, *size, 64, 128, 1, 1)
    operands = {k: v for k, v in inputs(case, torch.float32).items() if k in "xw"}
    together = conv(case, default(STRASSEN), **operands)
    for i in range(case.N):
        alone = conv(Case(1, *size, 64, 128, 1, 1), default(STRASSEN), operands["x"][i : i + 1], operands["w"])
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_pair(value):
    case = Case(2, 5, 5, 64, 64, 1, 1)
    operands = {k: v for k, v in inputs(case, torch.float32).items() if k in "xw"}
    for pixel in (0, 1, 6, 24):
        spoiled = operands["x"].clone()
        spoiled[1, 40].view(-1)[pixel] = value
        y = nhwc(conv(case, default(STRASSEN), spoiled, operands["w"])).view(2, 25, 64)
        touched = ~y.isfinite().all(2)
        assert not y[1, pixel].isfinite().any()
        assert all(n == 1 and p in (pixel, pixel ^ 1) for n, p in touched.nonzero().tolist())


@pytest.mark.parametrize("layout", ["dense", "transposed"])
@pytest.mark.parametrize("channels", [(64, 64), (96, 128), (256, 192)], ids=str)
def test_filters_of_any_strides_have_conv_packs_bits(channels, layout):
    c, k = channels
    shape = [1, 8, 8, c, k, 1, 1, 8, 8, 1, 1, 0, 0, 1, 1, 1]
    w = torch.randn(k, c) if layout == "dense" else torch.randn(c, k).t()
    size = _C.conv_packed_bytes(shape, 0, STRASSEN)
    assert size == k * c * 7
    dense, strided, filters = aligned(size // 4), aligned(size // 4), w.contiguous()
    _C.conv_pack(shape, 0, STRASSEN, dense.data_ptr(), filters.data_ptr(), 0, 1)
    for threads in (1, 3):
        _C.conv_pack_strided(shape, STRASSEN, strided.data_ptr(), w.data_ptr(), *w.stride(), 1, 1, threads, 0)
        assert not dense.isnan().any() and torch.equal(dense, strided)


def test_when_it_runs():
    """Where it pays, never under `exact` and, so that the bits do not, whatever the number of threads."""

    def chosen(n, size, c, k, dtype=0, threads=2, exact=False):
        shape = [n, size, size, c, k, 1, 1, size, size, 1, 1, 0, 0, 1, 1, 1]
        return NAMES[_C.conv_heuristic(shape, dtype, threads, exact)[0]]

    for threads in (1, 2, 64):
        assert chosen(16, 28, 512, 128, threads=threads) == "strassen"
        assert chosen(1, 7, 512, 2048, threads=threads) == "direct"
        assert chosen(16, 56, 64, 256, threads=threads) == "direct"
    assert chosen(16, 28, 512, 128, exact=True) == "direct"
    assert chosen(16, 28, 512, 128, dtype=1) == "direct"


@pytest.mark.parametrize(
    "change,reason",
    [((3, 70), "halves"), ((4, 100), "halves"), ((5, 3), "1x1"), ((9, 2), "stride 1"), ((11, 1), "padding"),
     ((15, 2), "one group")],
    ids=lambda v: v if isinstance(v, str) else None,
)  # fmt: skip
def test_refusals(change, reason):
    shape = [2, 8, 8, 64, 64, 1, 1, 8, 8, 1, 1, 0, 0, 1, 1, 1]
    assert _C.conv_why_not(shape, 0, STRASSEN) is None
    assert "bfloat16" in _C.conv_why_not(shape, 1, STRASSEN)
    assert "pairs" in _C.conv_why_not([64, 1, 1, 64, 64, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1], 0, STRASSEN)
    shape[change[0]] = change[1]
    assert reason in _C.conv_why_not(shape, 0, STRASSEN)
