"""The weight gradient of a stem by Winograd along the rows: its error, its bits, what it refuses, NaN."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("resnet_fast._C", reason="the compiled module is not there")

from resnet_fast import _C

# N, H, W, K, rows of the filter, stride of the rows, padding: tiles cut by the edge, chunks that begin inside an image,
# one row of outputs, several panels
CASES = [
    (2, 64, 64, 64, 7, 2, (3, 3)),
    (3, 65, 50, 32, 7, 2, (3, 3)),
    (1, 224, 224, 64, 7, 2, (3, 3)),
    (2, 19, 23, 96, 5, 1, (0, 1)),
    (150, 3, 9, 32, 3, 2, (0, 0)),
    (70, 7, 8, 32, 7, 2, (3, 3)),
    (1, 12, 130, 64, 1, 2, (0, 4)),
]


def sizes(case):
    n, h, w, k, r, step, (above, left) = case
    p, q = (h + 2 * above - r) // step + 1, (w + 2 * left - 7) // 2 + 1
    return (n, h, w, 3, k, r, 7, p, q, step, 2, above, left, 1, 1, 1)


def tensors(case):
    n, h, w, c, k, r, s, p, q = sizes(case)[:9]
    made = torch.randn(n, k, p, q), torch.randn(n, c, h, w), torch.randn(k, c, r, s)
    return [t.contiguous(memory_format=torch.channels_last) for t in made]


def weight_gradient(case, dy, x, dw, threads=2):
    assert _C.conv_wgrad_stem_why_not(sizes(case), 0) is None
    _C.conv_wgrad_stem(sizes(case), 0, dw.data_ptr(), *dw.stride(), dy.data_ptr(), x.data_ptr(), threads)
    return dw


def plain(case, dy, x, w):
    step, padding = case[5], list(case[6])
    options = ([step, 2], padding, [1, 1], False, [0, 0], 1, [False, True, False])
    return torch.ops.aten.convolution_backward(dy, x, w, None, *options)[1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_by_the_law(case):
    """In rms twice eager's error in its worse format and one rounding (0.3 to 1.7 times measured); over several draws."""
    own = eager = size = 0.0
    for _ in range(4):
        dy, x, w = tensors(case)
        dw = weight_gradient(case, dy, x, torch.full_like(w, float("nan")))
        truth = plain(case, dy.double(), x.double(), w.double())
        own += (dw.double() - truth).square().mean()
        worst = [plain(case, dy, x, w), plain(case, dy.contiguous(), x.contiguous(), w.contiguous())]
        eager += max((p.double() - truth).square().mean() for p in worst)
        size += truth.square().mean()
    assert own**0.5 <= 2 * eager**0.5 + torch.finfo(torch.float32).eps / 2 * size**0.5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_for_any_team_and_layout(case):
    dy, x, w = tensors(case)
    dw = weight_gradient(case, dy, x, torch.full_like(w, float("nan")), 1)
    for threads in (2, 3, 16):
        assert torch.equal(weight_gradient(case, dy, x, torch.full_like(w, float("nan")), threads), dw)
    assert torch.equal(weight_gradient(case, dy, x, torch.full(w.shape, float("nan"))), dw)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoiled", ["dy", "x"])
def test_what_is_not_finite_is_told(spoiled, value):
    """conv_weight_gradient: False, and the caller computes it otherwise; finite tensors True."""
    dy, x, w = tensors(CASES[1])
    dw = torch.empty_like(w)

    def told():
        place = (dw.data_ptr(), dw.stride(), dy.data_ptr(), x.data_ptr())
        return _C.conv_weight_gradient(sizes(CASES[1]), 0, *place, False, 2)

    assert told()
    (dy if spoiled == "dy" else x)[2, 1, 7, 9] = value
    assert not told()


@pytest.mark.parametrize(
    "change,reason",
    [((3, 4), "3 input channels"), ((6, 5), "7 wide"), ((10, 1), "stride 2"), ((13, 2), "dilation"), ((4, 44), "panels"),
     ((0, 0), "few pixels")],
    ids=lambda v: v if isinstance(v, str) else None,
)  # fmt: skip
def test_refusals(change, reason):
    shape = list(sizes(CASES[0]))
    assert "float32" in _C.conv_wgrad_stem_why_not(shape, 1)
    shape[change[0]] = change[1]
    assert reason in _C.conv_wgrad_stem_why_not(shape, 0)
