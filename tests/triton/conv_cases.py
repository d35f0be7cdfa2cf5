"""Checks of the Triton rooms of the convolutions, run by every engine."""

from __future__ import annotations

import torch
from cases import FLOAT32_SUM, double, random, room
from law import within_law

from resnet_fast.ops.bn_act import eager as bn_eager
from resnet_fast.ops.bn_act_conv2d import eager as chain_eager
from resnet_fast.ops.conv2d import eager as conv_eager
from resnet_fast.ops.conv2d import triton_tiles
from resnet_fast.ops.conv2d.triton_tiles import gemm_tiles
from resnet_fast.ops.conv_bn_act import eager as fused_eager
from resnet_fast.ops.max_pool2d.op import output_size
from resnet_fast.ops.recomputed_conv_bn_act import eager as stem_eager

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


def check_folded(name, dtype, residual=True, relu=True, device="cpu", seed=0):
    """conv_bn_act of a frozen model: the norm is in the filters, beta is the bias, and there are no statistics."""
    x, weight, geometry = given(name, dtype, seed, device)
    beta = random((weight.shape[0],), dtype, seed + 3, device)
    shape = conv_eager.fwd(x, weight, None, *geometry).shape
    r = random(shape, dtype, seed + 9, device) if residual else None
    arguments = (x, weight, None, None, beta, None, None, r, 0.0, relu)
    assert room("conv_bn_act").why_not("fwd", *arguments, *geometry) is None
    y = room("conv_bn_act").fwd(*arguments, *geometry)
    eager = fused_eager.fwd(*arguments, *geometry)
    truth = fused_eager.fwd(*(double(t)[0] if isinstance(t, torch.Tensor) else t for t in arguments), *geometry)
    assert y.stride() == eager.stride()
    sums = conv_eager.fwd(x.double().abs(), weight.double().abs(), None, *geometry).max() + truth.abs().max()
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
    statistics_within_law(y, mean, var)


def statistics_within_law(y, mean, var):
    """Mean and variance of a stored tensor. Eager sums in float64; a float32 sum may lose a part of its summands."""
    eager, truth = bn_eager.statistics(y), bn_eager.statistics(y.double())
    spread = (y.double() - truth[0][:, None, None]).square().max()
    for what, a, b, t, size in zip(("mean", "var"), (mean, var), eager, truth, (y.abs().max(), spread)):
        within_law(a, b, t, what, FLOAT32_SUM * float(size))


def check_prologue(name, dtype, training=True, affine=True, bias=True, device="cpu", seed=0):
    """bn_act_conv2d: the normalised activation rounds as if bn_act had stored it, and padding stays zero."""
    z, weight, geometry = given(name, dtype, seed, device)
    c = z.shape[1]
    gamma, beta = (random((c,), torch.float32, seed + 3 + i, device, 0.5, 1.0 - i) for i in range(2))
    gamma, beta = (gamma, beta) if affine else (None, None)
    mean = None if training else random((c,), torch.float32, seed + 5, device)
    var = None if training else random((c,), torch.float32, seed + 6, device).abs() + 0.5
    b = random((weight.shape[0],), dtype, seed + 7, device) if bias else None
    arguments = (z, gamma, beta, mean, var, weight, b, training, 1e-5, *geometry)
    assert room("bn_act_conv2d").why_not("fwd", *arguments) is None
    y, *found = room("bn_act_conv2d").fwd(*arguments)
    eager, *_ = chain_eager.fwd(*arguments)
    truth, *statistics = chain_eager.fwd(*(double(t)[0] if isinstance(t, torch.Tensor) else t for t in arguments))
    assert y.stride() == eager.stride()
    activation, *_ = room("bn_act").fwd(z, gamma, beta, mean, var, None, training, 1e-5, True)
    sums = conv_eager.fwd(activation.double(), weight.double().abs(), None, *geometry).max()
    within_law(y, eager, truth, f"{name} {dtype}", allowance(z, sums))
    assert all(a.shape == t.shape for a, t in zip(found, statistics))
    if training:
        statistics_within_law(z, *found)
    if room("conv2d").forward_geometry(z, weight, y.shape[2:], *geometry)["RUN"] or c == 3:
        return  # few channels: without a prologue another path sums in another order
    assert torch.equal(y, room("conv2d").fwd(activation, weight, b, *geometry)), "bit for bit the two operators"


def check_prologue_backward(
    name, dtype, training=True, affine=True, wants=(True,) * 5, vectors=torch.float32, nan=False, bitwise=False,
    way="prologue", device="cpu", seed=0,
):  # fmt: skip
    """bn_act_conv2d's backward against float64.

    dgamma and dbeta are sums of the stored dy: they are held to float64's of that very dy (of a few channels eager's error of
    the whole chain is a draw). `bitwise`: all tiles are one, without a split; then dw, and dz with known statistics, are bit
    for bit those of the two operators.
    """
    z, weight, geometry = given(name, dtype, seed, device)
    c = z.shape[1]
    gamma, beta = (random((c,), vectors, seed + 3 + i, device, 0.5, 1.0 - i) for i in range(2))
    gamma, beta = (gamma, beta) if affine else (None, None)
    mean, var = (t.float() for t in bn_eager.statistics(z))
    if not training:
        mean, var = (mean + random((c,), torch.float32, seed + 5, device, 0.3)).to(vectors), (var * 1.5).to(vectors)
    # The mask is found from z; values a rounding away from zero may fall on either side of it.
    kink = bn_eager.fwd(*double(z, gamma, beta, mean, var), None, False, 1e-5, False)[0]
    rstd = (var.double() + 1e-5).rsqrt()
    gain = (rstd if gamma is None else gamma.double() * rstd)[:, None, None]
    z = torch.where(kink.abs() < 4 * torch.finfo(dtype).eps * kink.abs().max(), z + 1 / gain, z).to(dtype)
    z = z.contiguous(memory_format=torch.channels_last)
    dout = random(conv_eager.fwd(z, weight, None, *geometry).shape, dtype, seed + 7, device)
    if nan:
        dout[0, 0, 0, 0], z[-1, -1, -1, -1] = float("nan"), float("inf")
    norm = (gamma, beta, mean, var)
    arguments = (dout, z, *norm, weight, True, training, 1e-5, *geometry, list(wants))
    assert room("bn_act_conv2d").why_not("bwd", *arguments) is None
    with triton_tiles.way(way):
        ours = room("bn_act_conv2d").bwd(*arguments)
    eager = chain_eager.bwd(*arguments)
    truth = chain_eager.bwd(*(double(t)[0] if isinstance(t, torch.Tensor) else t for t in arguments))
    y = room("bn_act").fwd(z, *norm, None, False, 1e-5, True)[0]
    again = [any(wants[:3]), wants[3] and bitwise, False]
    dy, dw, _ = room("conv2d").bwd(dout, y, weight, True, *geometry, again)
    sums = conv_eager.bwd(*(t.abs().nan_to_num() for t in double(dout, y, weight)), True, *geometry, [True] * 3)
    extra = [allowance(z, size) for size in ((sums[0].max() * gain.abs().max()), 0, 0, sums[1].max(), sums[2].max())]
    for what, a, b, t, more, wanted in zip(("dz", "dgamma", "dbeta", "dw", "db"), ours, eager, truth, extra, wants):
        assert a.shape == b.shape and a.dtype == b.dtype, what
        assert a.numel() > 0 if wanted else a.numel() == 0, what
        if wanted and what not in ("dgamma", "dbeta"):
            assert what != "dz" or a.stride() == b.stride()
            within_law(a, b, t, f"{name} {what} {dtype}", more)
    few = c == 3 or room("conv2d").forward_geometry(z, weight, dout.shape[2:], *geometry)["RUN"]
    if wants[3] and bitwise and not few:  # of few channels the two operators sum in another order
        assert torch.equal(ours[3].nan_to_num(77.0), dw.nan_to_num(77.0)), "dw: bit for bit the two operators"
    if not again[0]:
        return
    given_ = (dy, z, y, *norm)
    eager, truth = (bn_eager.bwd(*t, training, 1e-5, True, [*wants[:3], False]) for t in (given_, double(*given_)))
    largest = FLOAT32_SUM * float(dy.double().nan_to_num().abs().sum((0, 2, 3)).max()) * 4  # four: of |z - mean| rstd
    rounding = FLOAT32_SUM * float(truth[0].nan_to_num().abs().max()) if wants[0] and dtype == torch.float32 else 0.0
    parts = zip(("dz", "dgamma", "dbeta"), ours, eager, truth, (rounding, largest, largest))
    for what, a, b, t, more in parts:
        if a.numel():
            within_law(a, b.to(a.dtype), t, f"{name} {what} of dy {dtype}", more)
    if wants[0] and bitwise and not training:
        separate = room("bn_act").bwd(dy, z, None, *norm, False, 1e-5, True, [True, False, False, False])[0]
        assert torch.equal(ours[0].nan_to_num(77.0), separate.nan_to_num(77.0)), "dz: bit for bit the two operators"


def check_chain(name, dtype, device="cpu", seed=0):
    """Prologue and statistics together: the inner link of a block in training."""
    z, weight, geometry = given(name, dtype, seed, device)
    mean, var = room("bn_act").statistics(z)
    before = room("conv2d").prologue(None, None, mean, var, 1e-5)
    y, out_mean, out_var = room("conv2d").forward_statistics(z, weight, None, *geometry, before)
    assert torch.equal(y, room("bn_act_conv2d").fwd(z, None, None, mean, var, weight, None, False, 1e-5, *geometry)[0])
    statistics_within_law(y, out_mean, out_var)


def check_combination(name, dtype, prologue, scale, shift, residual, relu, statistics=False, device="cpu", seed=0):
    """gather_gemm with these parts of prologue and epilogue, and no others, against float64 in plain torch."""
    x, weight, geometry = given(name, dtype, seed, device)
    (k, c), shape = (weight.shape[0], x.shape[1]), conv_eager.fwd(x, weight, None, *geometry).shape
    vectors = {
        "scale_ptr": random((k,), torch.float32, seed + 2, device, 0.5, 1.0) if scale else None,
        "shift_ptr": random((k,), torch.float32, seed + 3, device) if shift else None,
    }
    added = random(shape, dtype, seed + 4, device) if residual else None
    mean, gamma, beta = (random((c,), torch.float32, seed + 5 + i, device, 0.5, i == 1) for i in range(3))
    var = random((c,), torch.float32, seed + 8, device).abs() + 0.5
    epilogue = vectors | dict(residual_ptr=added)
    if prologue:
        epilogue |= room("conv2d").prologue(gamma, beta, mean, var, 1e-5)
    out = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    stride, padding, dilation, groups = geometry
    found = room("conv2d").forward(x, weight, stride, padding, dilation, groups, out, epilogue, relu, statistics)

    def plain(x, weight, added, gamma, beta, mean, var, by, to):
        if prologue:
            x = bn_eager.fwd(x, gamma, beta, mean, var, None, False, 1e-5, True)[0]
        y = conv_eager.fwd(x, weight, None, *geometry)
        y = y if by is None else (y * by[:, None, None]).to(x.dtype)
        y = y if to is None else (y + to[:, None, None]).to(x.dtype)
        y = y if added is None else y + added
        return torch.relu(y) if relu else y

    tensors = (x, weight, added, gamma, beta, mean, var, *vectors.values())
    eager, truth = plain(*tensors), plain(*double(*tensors))
    assert out.stride() == eager.stride()
    magnitude = plain(*(None if t is None else t.abs() for t in double(*tensors[:3])), *double(*tensors[3:])).max()
    if prologue:
        x = bn_eager.fwd(*double(x, gamma, beta, mean, var), None, False, 1e-5, True)[0]
    largest = conv_eager.fwd(x.double().abs(), weight.double().abs(), None, *geometry).max()
    largest *= 1 if vectors["scale_ptr"] is None else float(vectors["scale_ptr"].abs().max())
    within_law(out, eager, truth, f"{name} {dtype}", allowance(x.to(dtype), largest + magnitude.abs()))
    if statistics:
        mean, var = room("bn_act").merge(found[0], out.numel() // k, found[1])
        statistics_within_law(out, mean, var)


#: (x shape, weight shape, stride, padding, dilation, groups) of convolutions with a 3x3 max pool of stride 2 behind them
STEMS = {
    "7x7": ((2, 3, 30, 38), (24, 3, 7, 7), 2, 3, 1, 1),
    "odd width": ((1, 3, 29, 33), (16, 3, 7, 7), 2, 3, 1, 1),
    "3x3": ((1, 3, 9, 14), (70, 3, 3, 3), 1, 1, 1, 1),
    "wide": ((1, 3, 11, 150), (8, 3, 7, 7), 2, 3, 1, 1),
    "asymmetric": ((1, 1, 13, 16), (8, 1, 5, 4), (1, 2), (0, 1), (2, 1), 1),
}


def check_stem(name, dtype, ceil=False, affine=True, nan=False, device="cpu", seed=0):
    """The stem in inference, one kernel from the image to the pooled map, against float64."""
    x, weight, geometry = given(name if not isinstance(name, str) else STEMS[name], dtype, seed, device)
    k = weight.shape[0]
    if nan:
        x[0, 0, 3, 4] = float("nan")
    bias, gamma, beta, mean, var = (random((k,), torch.float32, seed + 3 + i, device) for i in range(5))
    vectors = (
        (bias.to(dtype), gamma, beta, mean, var.abs() + 0.5) if affine else (None, None, None, mean, var.abs() + 0.5)
    )
    shape = conv_eager.fwd(x, weight, None, *geometry).shape
    size = output_size(x.new_empty(shape, device="meta"), (3, 3), (2, 2), (1, 1), (1, 1), ceil)
    pool = [3, 3, 2, 2, 1, 1, 1, 1, *size]

    def arguments(t, w, v):
        return (t, *(None,) * 4, w, *v, None, False, 1.0, 1e-5, True, *geometry, pool)

    own = arguments(x, weight, vectors)
    assert room("recomputed_conv_bn_act").why_not("fwd", *own) is None
    y = room("recomputed_conv_bn_act").fwd(*own)
    eager = stem_eager.fwd(*own)
    truth = stem_eager.fwd(*arguments(*double(x, weight), double(*vectors)))
    assert y.stride() == eager.stride()
    scale = 1.5 * float(gamma.abs().max()) if affine else 1.5
    largest = conv_eager.fwd(*double(x.nan_to_num().abs(), weight.abs()), None, *geometry).max() * scale
    within_law(y, eager, truth, f"{name} {dtype}", allowance(x, largest + truth.nan_to_num().max()))


def every_tile(bytes_, ieee=False):
    """All tiles the chooser may pick for large problems, as the problems' sizes vary."""
    found = set()
    for n in (64, 128, 512):
        for m in (256, 6272, 200704):
            found |= set(gemm_tiles(m, n, 4608, 512, bytes_, ieee, 108, 1, 80))
    return sorted(found, key=str)
