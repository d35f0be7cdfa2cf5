"""Checks of the Triton rooms of the convolutions, run by every engine."""

from __future__ import annotations

import torch
from cases import double, random, room
from law import within_law

from resnet_fast.ops.conv2d import eager as conv_eager
from resnet_fast.ops.conv_bn_act import eager as fused_eager

#: (x shape, weight shape, stride, padding, dilation, groups)
GEOMETRIES = {
    "3x3": ((2, 16, 7, 9), (32, 16, 3, 3), 1, 1, 1, 1),
    "3x3 stride 2": ((2, 16, 7, 8), (16, 16, 3, 3), 2, 1, 1, 1),
    "1x1": ((2, 32, 5, 7), (16, 32, 1, 1), 1, 0, 1, 1),
    "1x1 stride 2": ((2, 16, 7, 6), (16, 16, 1, 1), 2, 0, 1, 1),
    "stem": ((1, 3, 19, 21), (16, 3, 7, 7), 2, 3, 1, 1),
    "stem even": ((2, 3, 18, 22), (16, 3, 7, 7), 2, 3, 1, 1),
    "stem 3x3": ((2, 3, 8, 9), (16, 3, 3, 3), 1, 1, 1, 1),
    "stem patches": ((1, 3, 16, 24), (16, 3, 8, 8), 8, 0, 1, 1),
    "odd channels": ((2, 5, 6, 7), (9, 5, 3, 3), 1, 1, 1, 1),
    "many odd channels": ((1, 65, 5, 4), (33, 65, 3, 3), 1, 1, 1, 1),
    "one channel": ((1, 1, 8, 8), (1, 1, 3, 3), 1, 1, 1, 1),
    "groups": ((2, 32, 6, 5), (32, 8, 3, 3), 1, 1, 1, 4),
    "depthwise": ((2, 6, 6, 7), (6, 1, 3, 3), 2, 1, 1, 6),
    "dilation": ((1, 16, 9, 11), (16, 16, 3, 3), 1, 2, 2, 1),
    "dilation and stride": ((1, 8, 11, 12), (8, 8, 3, 3), 2, 2, 3, 1),
    "stride 3": ((1, 16, 10, 11), (16, 16, 2, 2), 3, 0, 1, 1),
    "asymmetric": ((2, 16, 9, 6), (8, 16, 3, 2), (2, 1), (1, 0), (1, 2), 1),
    "wide padding": ((1, 8, 4, 4), (8, 8, 3, 3), 1, 3, 1, 1),
    "large filter": ((1, 16, 9, 9), (16, 16, 6, 7), 1, 3, 1, 1),
    "all equal": ((8, 8, 8, 8), (8, 8, 3, 3), 1, 1, 1, 1),
}


def _pair(v):
    return [v, v] if isinstance(v, int) else list(v)


def given(name, dtype, seed, device="cpu"):
    """x, weight and the geometry's arguments."""
    shape, filters, stride, padding, dilation, groups = GEOMETRIES[name] if isinstance(name, str) else name
    x = random(shape, dtype, seed, device)
    fan = filters[1] * filters[2] * filters[3]
    weight = random(filters, dtype, seed + 1, device, scale=fan**-0.5)
    return x, weight, (_pair(stride), _pair(padding), _pair(dilation), groups)


def allowance(x, *sums) -> float:
    """float32 sums and, for float32 inputs, tf32 where it is allowed."""
    tf32 = room("conv2d").precision(x) == "tf32"
    return (2.0**-10 if tf32 else 2.0**-22) * float(max(sums)) if x.dtype == torch.float32 else 0.0


def check_forward(name, dtype, bias=True, device="cpu", seed=0):
    """conv2d's forward against float64."""
    x, weight, geometry = given(name, dtype, seed, device)
    b = random((weight.shape[0],), dtype, seed + 2, device) if bias else None
    assert room("conv2d").why_not("fwd", x, weight, b, *geometry) is None
    y = room("conv2d").fwd(x, weight, b, *geometry)
    eager, truth = conv_eager.fwd(x, weight, b, *geometry), conv_eager.fwd(*double(x, weight, b), *geometry)
    assert y.stride() == eager.stride()
    within_law(
        y,
        eager,
        truth,
        f"{name} {dtype}",
        allowance(x, conv_eager.fwd(x.double().abs(), weight.double().abs(), None, *geometry).max()),
    )


def check_fused(name, dtype, residual=True, relu=True, affine=True, other=None, device="cpu", seed=0):
    """conv_bn_act against float64."""
    x, weight, geometry = given(name, dtype, seed, device)
    k = weight.shape[0]
    bias, gamma, beta, mean, var = (random((k,), torch.float32, seed + 3 + i, device) for i in range(5))
    vectors = (
        None if affine else bias.to(dtype),
        gamma if affine else None,
        beta if affine else None,
        mean,
        var.abs() + 0.5,
    )
    shape = conv_eager.fwd(x, weight, None, *geometry).shape
    r = random(shape, other or dtype, seed + 9, device) if residual else None
    arguments = (x, weight, *vectors, r)
    assert room("conv_bn_act").why_not("fwd", *arguments, 1e-5, relu, *geometry) is None
    y = room("conv_bn_act").fwd(*arguments, 1e-5, relu, *geometry)
    eager = fused_eager.fwd(*arguments, 1e-5, relu, *geometry)
    truth = fused_eager.fwd(*double(*arguments), 1e-5, relu, *geometry)
    assert y.stride() == eager.stride()
    scale = float((gamma.abs() if affine else 1 + 0 * gamma).max()) * 1.5
    sums = conv_eager.fwd(x.double().abs(), weight.double().abs(), None, *geometry).max() * scale + truth.abs().max()
    within_law(y, eager, truth, f"{name} {dtype}", allowance(x, sums))


def check_backward(name, dtype, wants=(True, True, True), device="cpu", seed=0):
    """conv2d's three gradients against float64."""
    x, weight, geometry = given(name, dtype, seed, device)
    dy = random(conv_eager.fwd(x, weight, None, *geometry).shape, dtype, seed + 4, device)
    assert room("conv2d").why_not("bwd", dy, x, weight, True, *geometry, list(wants)) is None
    ours = room("conv2d").bwd(dy, x, weight, True, *geometry, list(wants))
    eager = conv_eager.bwd(dy, x, weight, True, *geometry, list(wants))
    truth = conv_eager.bwd(*double(dy, x, weight), True, *geometry, list(wants))
    sums = conv_eager.bwd(*(t.abs() for t in double(dy, x, weight)), True, *geometry, list(wants))
    for part, a, b, t, s, wanted in zip(("dx", "dw", "db"), ours, eager, truth, sums, wants):
        assert (
            a.shape == b.shape and (part != "dx" or a.stride() == b.stride()) and (part == "dx" or a.is_contiguous())
        ), part
        if wanted:
            within_law(a, b, t, f"{name} {part} {dtype}", allowance(x, s.abs().max()))


def check_statistics(name, dtype, bias=True, device="cpu", seed=0):
    """The statistics epilogue: the convolution bit for bit, its output's mean and variance."""
    x, weight, geometry = given(name, dtype, seed, device)
    b = random((weight.shape[0],), dtype, seed + 2, device, shift=3.0) if bias else None
    y, mean, var = room("conv2d").forward_statistics(x, weight, b, *geometry)
    assert torch.equal(y, room("conv2d").fwd(x, weight, b, *geometry))
    truth = y.double()
    scale = float(truth.abs().max())
    torch.testing.assert_close(mean.double(), truth.mean((0, 2, 3)), rtol=0, atol=2.0**-22 * scale)
    variance = truth.var((0, 2, 3), unbiased=False)
    assert ((var.double() - variance).abs() <= 1e-5 * variance + 1e-12).all(), (var, variance)
