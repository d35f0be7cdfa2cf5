"""Checks of the Triton rooms of the element-wise operators, run by every engine: interpreter, simulator, GPU."""

from __future__ import annotations

import importlib

import torch
from law import within_law

from resnet_fast.ops import triton_common
from resnet_fast.ops.add_relu import eager as add_relu_eager
from resnet_fast.ops.bn_act import eager as bn_eager
from resnet_fast.ops.bn_act_global_avg_pool2d import eager as bn_mean_eager
from resnet_fast.ops.bn_act_max_pool2d import eager as bn_pool_eager
from resnet_fast.ops.max_pool2d import eager as pool_eager
from resnet_fast.ops.max_pool2d.op import output_size
from resnet_fast.ops.scale_add_relu import eager as scale_eager

#: Eager's reductions on a CPU run in float64. A float32 sum may lose this much of its summands' magnitude.
FLOAT32_SUM = 2.0**-22
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def room(op: str):
    """The Triton room of an operator."""
    return importlib.import_module(f"resnet_fast.ops.{op}.triton")


def random(shape, dtype, seed: int, device="cpu", scale=1.0, shift=0.0) -> torch.Tensor:
    """Fresh normal values, channels_last."""
    g = torch.Generator().manual_seed(seed)
    t = (torch.randn(shape, generator=g) * scale + shift).to(dtype)
    return (t.to(memory_format=torch.channels_last) if t.dim() == 4 else t).to(device)


def double(*tensors):
    """The same values in float64."""
    return [None if t is None else t.double() for t in tensors]


def special(t: torch.Tensor) -> torch.Tensor:
    """NaN, infinities and zeros among the values."""
    for i, v in enumerate((float("nan"), float("inf"), -float("inf"), 0.0, -0.0)):
        t.view(-1)[i * 7 % t.numel()] = v
    return t


def check_add_relu(shape, dtype, other=None, nan=False, device="cpu", seed=0):
    """Forward and backward against float64."""
    x, residual = random(shape, dtype, seed, device), random(shape, other or dtype, seed + 1, device)
    if nan:
        x = special(x.contiguous()).to(memory_format=torch.channels_last)
    dy = random(shape, torch.result_type(x, residual), seed + 2, device)
    assert room("add_relu").why_not("fwd", x, residual) is None
    y = room("add_relu").fwd(x, residual)
    assert y.stride() == add_relu_eager.fwd(x, residual).stride()
    within_law(y, add_relu_eager.fwd(x, residual), add_relu_eager.fwd(*double(x, residual)), "y")
    dx = room("add_relu").bwd(dy, y)
    within_law(dx, add_relu_eager.bwd(dy, y), add_relu_eager.bwd(*double(dy, y)), "dx")


def check_bn_act(
    shape, dtype, residual=False, relu=True, training=True, affine=(True, True), wants=(True, True, True, True),
    scale=1.0, shift=0.0, other=None, vectors=torch.float32, device="cpu", seed=0,
):  # fmt: skip
    """Forward (y, batch statistics) and backward (all four gradients) against float64."""
    c = shape[1]
    x = random(shape, dtype, seed, device, scale, shift)
    r = random(shape, other or dtype, seed + 1, device) if residual else None
    weight = random((c,), vectors, seed + 2, device, 0.5, 1.0) if affine[0] else None
    bias = random((c,), vectors, seed + 3, device) if affine[1] else None
    mean = None if training else random((c,), vectors, seed + 4, device)
    var = None if training else random((c,), vectors, seed + 5, device).abs() + 0.5
    given = (x, weight, bias, mean, var, r)
    assert room("bn_act").why_not("fwd", *given, training, 1e-5, relu) is None
    ours = room("bn_act").fwd(*given, training, 1e-5, relu)
    eager = bn_eager.fwd(*given, training, 1e-5, relu)
    truth = bn_eager.fwd(*double(*given), training, 1e-5, relu)
    for name, a, b, t in zip(("y", "mean", "var"), ours, eager, truth):
        assert a.stride() == b.stride(), name
        within_law(
            a,
            b.to(a.dtype),
            t,
            name,
            0.0 if dtype != torch.float32 and name == "y" else FLOAT32_SUM * float(x.abs().max()),
        )
    y = ours[0]
    statistics = (ours[1], ours[2]) if training else (mean, var)
    dy = random(shape, y.dtype, seed + 6, device)
    kept = y if residual and relu else None
    back = (dy, x, kept, weight, bias, *statistics)
    grads = room("bn_act").bwd(*back, training, 1e-5, relu, list(wants))
    # The mask is part of the input here: values a rounding away from zero may fall on either side.
    same = (*back[:2], y, *back[3:])
    eager = bn_eager.bwd(*same, training, 1e-5, relu, list(wants))
    truth = bn_eager.bwd(*double(*same), training, 1e-5, relu, list(wants))
    largest = float(dy.double().abs().sum((0, 2, 3)).max())
    extra = {
        "dx": FLOAT32_SUM * float(truth[0].abs().max()) if wants[0] and dtype == torch.float32 else 0.0,
        "dresidual": 0.0,
    }
    for name, a, b, t in zip(("dx", "dweight", "dbias", "dresidual"), grads, eager, truth):
        assert a.shape == b.shape
        if a.numel():
            assert a.stride() == b.stride()
            within_law(a, b.to(a.dtype), t, name, extra.get(name, FLOAT32_SUM * largest))


def check_max_pool(shape, dtype, kernel, stride, padding, dilation=(1, 1), ceil=False, nan=False, device="cpu", seed=0):
    """Values and places equal eager's; dx by the tolerance law."""
    x = random(shape, dtype, seed, device)
    x = (x * 2).round() / 2  # equal values: the first must win
    if nan:
        x = special(x.contiguous()).to(memory_format=torch.channels_last)
    size = output_size(x, kernel, stride, padding, dilation, ceil)
    window = ([*kernel], [*stride], [*padding], [*dilation])
    for save in (True, False):
        ours = room("max_pool2d").fwd(x, *window, size, save)
        eager = pool_eager.fwd(x, *window, size, save)
        for a, b in zip(ours, eager):
            assert a.dtype == b.dtype and a.stride() == b.stride()
            assert (
                torch.equal(a.nan_to_num(nan=77.0), b.nan_to_num(nan=77.0))
                if a.is_floating_point()
                else torch.equal(a, b)
            )
    argmax = room("max_pool2d").fwd(x, *window, size, True)[1]
    dy = random((*shape[:2], *size), dtype, seed + 1, device)
    back = (argmax, *shape[2:], *window)
    dx = room("max_pool2d").bwd(dy, *back)
    within_law(dx, pool_eager.bwd(dy, *back), pool_eager.bwd(dy.double(), *back), "dx")


def check_bn_pool(
    shape, dtype, kernel, stride, padding, dilation=(1, 1), ceil=False, training=True, affine=(True, True),
    wants=(True, True, True), nan=False, device="cpu", seed=0,
):  # fmt: skip
    """The stem's end: values, places that hold them, and the gradients through the places."""
    c = shape[1]
    x = random(shape, dtype, seed, device, 2.0, 0.5)
    if nan:
        x[0, c // 2, 1, 1] = float("nan")
    weight = random((c,), torch.float32, seed + 2, device, 0.5, 1.0) if affine[0] else None
    bias = random((c,), torch.float32, seed + 3, device) if affine[1] else None
    if training:
        mean, var = bn_eager.fwd(x.nan_to_num(), None, None, None, None, None, True, 1e-5, False)[1:]
    else:
        mean, var = (
            random((c,), torch.float32, seed + 4, device),
            random((c,), torch.float32, seed + 5, device).abs() + 0.5,
        )
    norm = (weight, bias, mean, var)
    window = ([*kernel], [*stride], [*padding], [*dilation])
    size = output_size(x, kernel, stride, padding, dilation, ceil)
    assert room("bn_act_max_pool2d").why_not("fwd", x, *norm) is None
    y, places = room("bn_act_max_pool2d").fwd(x, *norm, 1e-5, *window, size, True)
    again, none = room("bn_act_max_pool2d").fwd(x, *norm, 1e-5, *window, size, False)
    assert torch.equal(y.nan_to_num(77.0), again.nan_to_num(77.0)) and none.numel() == 0
    eager, truth = (
        bn_pool_eager.fwd(t, *v, 1e-5, *window, size, True)[0] for t, v in ((x, norm), (x.double(), double(*norm)))
    )
    assert y.stride() == eager.stride() and places.stride() == y.stride() and places.dtype == torch.uint8
    extra = 0.0 if dtype != torch.float32 else FLOAT32_SUM * float(truth.nan_to_num().abs().max())
    within_law(y, eager, truth, "y", extra)
    assert torch.equal(places == 255, y <= 0), "no place where nothing is above 0"
    # One of each window's taps is its place, and it holds the window's largest value.
    ones = torch.ones_like(truth)
    at = bn_pool_eager.unpooled(ones, places, *shape[2:], *window)
    assert float(at.sum()) == int((places != 255).sum())
    map_ = bn_eager.fwd(x.double(), *double(*norm), None, False, 1e-5, True)[0].nan_to_num(0.0)
    held, wanted = (float(t.sum()) for t in (map_ * at, truth.nan_to_num(0.0)))
    slack = float(truth.nan_to_num().abs().sum()) * 2 * torch.finfo(dtype).eps
    assert abs(held - wanted) <= slack, (held, wanted, slack)
    dy = random(y.shape, dtype, seed + 6, device)
    x = x.nan_to_num()
    back = (dy, places, x, *norm)
    grads = room("bn_act_max_pool2d").bwd(*back, training, 1e-5, *window, list(wants))
    eager = bn_pool_eager.bwd(*back, training, 1e-5, *window, list(wants))
    truth = bn_pool_eager.bwd(dy.double(), places, *double(x, *norm), training, 1e-5, *window, list(wants))
    largest = float(dy.double().abs().sum((0, 2, 3)).max())
    rounding = FLOAT32_SUM * float(truth[0].abs().max()) if wants[0] and dtype == torch.float32 else 0.0
    extra = (rounding, FLOAT32_SUM * largest, FLOAT32_SUM * largest)
    for name, a, b, t, more in zip(("dx", "dweight", "dbias"), grads, eager, truth, extra):
        assert a.shape == b.shape
        if a.numel():
            assert a.stride() == b.stride()
            within_law(a, b.to(a.dtype), t, name, more)


def check_scale_add_relu(shape, dtype, other=None, wants=(True, True, True), nan=False, device="cpu", seed=0):
    """Squeeze-and-excite's end: forward and all three gradients against float64."""
    x, residual = random(shape, dtype, seed, device), random(shape, other or dtype, seed + 1, device)
    scale = random((*shape[:2], 1, 1), dtype, seed + 2, device)
    if nan:
        x = special(x.contiguous()).to(memory_format=torch.channels_last)
    assert room("scale_add_relu").why_not("fwd", x, scale, residual) is None
    y = room("scale_add_relu").fwd(x, scale, residual)
    eager = scale_eager.fwd(x, scale, residual)
    assert y.stride() == eager.stride()
    within_law(y, eager, scale_eager.fwd(*double(x, scale, residual)), "y")
    x = x.nan_to_num(posinf=1.0, neginf=-1.0)
    dy = random(shape, y.dtype, seed + 3, device)
    back = (dy, x, scale, y)
    assert room("scale_add_relu").why_not("bwd", *back, list(wants)) is None
    ours = room("scale_add_relu").bwd(*back, list(wants))
    eager, truth = (scale_eager.bwd(*t, list(wants)) for t in (back, double(*back)))
    largest = FLOAT32_SUM * float((dy.double() * x.double()).abs().sum((2, 3)).max())
    for name, a, b, t, more in zip(("dx", "dscale", "dresidual"), ours, eager, truth, (0.0, largest, 0.0)):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        if a.numel():
            assert a.stride() == b.stride() or name == "dscale"
            within_law(a, b, t, name, more)


def check_bn_mean(
    shape, dtype, residual=True, training=True, affine=(True, True), wants=(True, True, True, True),
    other=None, nan=False, device="cpu", seed=0,
):  # fmt: skip
    """The end of a network's last block: the pooled values, and the gradients without the map."""
    c = shape[1]
    x = random(shape, dtype, seed, device, 2.0, 0.5)
    r = random(shape, other or dtype, seed + 1, device) if residual else None
    if nan:
        x[0, c // 2, -1, -1] = float("nan")
    weight = random((c,), torch.float32, seed + 2, device, 0.5, 1.0) if affine[0] else None
    bias = random((c,), torch.float32, seed + 3, device) if affine[1] else None
    if training:
        mean, var = bn_eager.fwd(x.nan_to_num(), None, None, None, None, None, True, 1e-5, False)[1:]
    else:
        mean, var = (
            random((c,), torch.float32, seed + 4, device),
            random((c,), torch.float32, seed + 5, device).abs() + 0.5,
        )
    given = (x, weight, bias, mean, var, r)
    assert room("bn_act_global_avg_pool2d").why_not("fwd", *given, 1e-5) is None
    y = room("bn_act_global_avg_pool2d").fwd(*given, 1e-5)
    eager, truth = (bn_mean_eager.fwd(*t, 1e-5) for t in (given, double(*given)))
    assert y.stride() == eager.stride() and y.dtype == eager.dtype
    summands = bn_eager.fwd(*double(*given), False, 1e-5, True)[0].nan_to_num().abs().mean((2, 3)).max()
    within_law(y, eager, truth, "y", FLOAT32_SUM * float(summands))
    x = x.nan_to_num()
    dy = random(y.shape, y.dtype, seed + 6, device)
    # The mask is found from x and residual; values a rounding away from zero may fall on either side of it.
    kink = bn_eager.fwd(*double(x, weight, bias, mean, var, r), False, 1e-5, False)[0]
    slope = ((1.0 if weight is None else weight.double()) / (var.double() + 1e-5).sqrt())[:, None, None]
    near = kink.abs() < 4 * torch.finfo(dtype).eps * kink.abs().max()
    x = torch.where(near, x + 1 / slope, x).to(dtype)
    back = (dy, x, weight, bias, mean, var, r)
    assert room("bn_act_global_avg_pool2d").why_not("bwd", *back, training, 1e-5, list(wants)) is None
    grads = room("bn_act_global_avg_pool2d").bwd(*back, training, 1e-5, list(wants))
    eager, truth = (bn_mean_eager.bwd(*t, training, 1e-5, list(wants)) for t in (back, double(*back)))
    largest = FLOAT32_SUM * float(dy.double().abs().sum((0, 2, 3)).max())
    rounding = FLOAT32_SUM * float(truth[0].abs().max()) if wants[0] and dtype == torch.float32 else 0.0
    extra = (rounding, largest, largest, 0.0)
    for name, a, b, t, more in zip(("dx", "dweight", "dbias", "dresidual"), grads, eager, truth, extra):
        assert a.shape == b.shape, name
        if a.numel():
            assert a.stride() == b.stride(), name
            within_law(a, b.to(a.dtype), t, name, more)


def check_floor(reports) -> None:
    """Each launch reads every byte of its inputs and writes every byte of its outputs, and none of them both ways: the
    distinct bytes it moves are its tensors', once. No two lanes meet in a bank of shared memory."""
    for name, report in reports:
        assert report.counters["bank_conflicts"] == 0, (name, report.counters["bank_conflicts"])
        for tensor, moved in report.tensors.items():
            once = sorted((moved["read"], moved["written"]))
            assert once == [0, moved["bytes"]], f"{name}: {tensor} {moved}"


def interpreting() -> bool:
    """Whether this process runs kernels in Triton's interpreter."""
    return triton_common.interpreting()
