"""The compiled convolution functions against float64, every algorithm on every shape it accepts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from resnet_fast import _C
from tests.kernels.conv_cases import (
    CASES,
    DTYPES,
    NAMES,
    Case,
    algorithms_for,
    aligned,
    check,
    conv,
    default,
    inputs,
    is_inexact,
    reference,
)  # fmt: skip

RUNS = [(case, dtype, algorithm) for case in CASES for dtype in DTYPES for algorithm in algorithms_for(case, dtype)]
each_run = pytest.mark.parametrize(
    "case,dtype,algorithm", RUNS, ids=[f"{c}-{str(d)[6:]}-{NAMES[a]}" for c, d, a in RUNS]
)


@each_run
@pytest.mark.parametrize("epilogue", ["none", "scale_shift_relu", "all"])
def test_value(case, dtype, algorithm, epilogue):
    keep = {"none": "x w", "scale_shift_relu": "x w scale shift", "all": "x w scale shift residual"}[epilogue].split()
    relu = epilogue != "none"

    def draw():
        operands = {name: value for name, value in inputs(case, dtype).items() if name in keep}
        return conv(case, default(algorithm), relu=relu, **operands), operands | {"relu": relu}

    check(case, algorithm, dtype, draw)


@each_run
def test_threads_and_blocks_change_no_bit(case, dtype, algorithm):
    operands = inputs(case, dtype)
    once = conv(case, default(algorithm), relu=True, **operands)
    for threads in (2, 3, 7):
        for config in (default(algorithm), (algorithm, 0, 0, 1), (algorithm, 14, 32, 0), (algorithm, 5, 64, 1)):
            again = conv(case, config, relu=True, threads=threads, **operands)
            assert torch.equal(once, again), (threads, config)


STATED = [
    ("winograd4", torch.float32, 6.0), ("winograd2", torch.float32, 2.5), ("direct", torch.float32, 1.5),
    ("winograd4x2", torch.bfloat16, 3.5), ("winograd2", torch.bfloat16, 2.0), ("direct", torch.bfloat16, 1.1),
    ("winograd4_strided", torch.float32, 3.5), ("winograd4_strided", torch.bfloat16, 3.5),
]  # fmt: skip


@pytest.mark.parametrize("name,dtype,bound", STATED, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype, _ in STATED])
@pytest.mark.parametrize("channels,size", [(64, 28), (256, 14), (512, 7)])
def test_rms_error_of_a_layer(name, dtype, bound, channels, size):
    """The stated bound: rms error against float64 as a multiple of eager's, on a ResNet's 3x3 layers."""
    strided = name == "winograd4_strided"
    case = Case(1, size, size, channels, 64, 3, 3, stride=(2, 2) if strided else (1, 1), pad=(1, 1))
    assert_stated(name, dtype, bound, case)


def test_rms_error_of_the_stem():
    assert_stated("winograd_stem", torch.float32, 1.6, Case(1, 112, 112, 3, 64, 7, 7, stride=(2, 2), pad=(3, 3)))


def assert_stated(name, dtype, bound, case, draws=4):
    """Over several draws: of 4x4 outputs eager's own error is luck (12 draws of one layer: 2.65 to 3.00 times)."""
    own = eager = 0.0
    for _ in range(draws):
        operands = {key: value for key, value in inputs(case, dtype).items() if key in "xw"}
        truth = reference(case, torch.float64, **operands)
        eager += (reference(case, dtype, **operands).double() - truth).pow(2).mean()
        own += (conv(case, default(NAMES.index(name)), **operands).double() - truth).pow(2).mean()
    assert own.sqrt() <= bound * eager.sqrt()


@each_run
def test_fold_multiplies_filters(case, dtype, algorithm):
    def draw():
        operands = inputs(case, dtype)
        x, w, fold = operands["x"], operands["w"], torch.rand(case.K) + 0.5
        return conv(case, default(algorithm), x, w, fold=fold), {"x": x, "w": w * fold.view(-1, 1, 1, 1)}

    check(case, algorithm, dtype, draw)


@each_run
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_reach_the_outputs_they_should(case, dtype, algorithm, value):
    operands = inputs(case, dtype)
    at = (case.N - 1, case.C // 2, case.H // 2, case.W // 2)
    operands["x"][at] = value
    y = conv(case, default(algorithm), relu=True, **operands)
    touched = (
        reference(case, torch.float32, x=(~operands["x"].isfinite()).float(), w=torch.ones_like(operands["w"])) > 0
    )
    expected = reference(case, torch.float32, relu=True, **operands)
    # Wherever eager is not finite, so are we (Winograd and Strassen may make an infinity NaN); far away nothing changes.
    assert not y[~expected.isfinite()].isfinite().any()
    clean = dict(operands, x=operands["x"].nan_to_num(0.0, 0.0, 0.0))
    far = ~F.max_pool2d(touched.float(), 2 * FAR + 1, 1, FAR).bool() if is_inexact(algorithm) else ~touched
    assert torch.equal(y[far], conv(case, default(algorithm), relu=True, **clean)[far])


FAR = 4  # outputs: an infinity spreads over a Winograd tile's input, Strassen's pairs of pixels are closer


def test_heuristic_and_candidates_can_run():
    for case in CASES:
        for dtype in range(2):
            for threads in (1, 2, 7):
                for exact in (False, True):
                    config = _C.conv_heuristic(case.sizes, dtype, threads, exact)
                    assert _C.conv_why_not(case.sizes, dtype, config[0]) is None
                    assert not (exact and is_inexact(config[0]))
                offered = _C.conv_candidates(case.sizes, dtype, threads)
                assert offered[0] == _C.conv_heuristic(case.sizes, dtype, threads, False)
                assert len({tuple(c) for c in offered}) == len(offered)
                assert all(_C.conv_why_not(case.sizes, dtype, c[0]) is None for c in offered)


def test_every_candidate_is_right():
    for case in [*CASES[:4], replace(CASES[6], N=3), *CASES[16:18]]:
        for dtype in DTYPES:
            for config in _C.conv_candidates(case.sizes, DTYPES.index(dtype), 2):

                def draw(case=case, dtype=dtype, config=config):
                    operands = inputs(case, dtype)
                    return conv(case, config, relu=True, threads=2, **operands), operands | {"relu": True}

                check(case, config[0], dtype, draw)


@pytest.mark.parametrize("name,dtype", [("stem", DTYPES[0]), ("stem", DTYPES[1]), ("winograd_stem", DTYPES[0])])
def test_stem_reads_nchw(name, dtype):
    stem, code = NAMES.index(name), DTYPES.index(dtype)
    for case in (case for case in CASES if case.C == 3):
        planar = (*case.sizes, 1)
        wide = name == "winograd_stem"
        assert "NHWC" in _C.conv_why_not(planar, code, NAMES.index("direct"))
        if wide and not (case.S == 7 and case.stride[1] == 2):
            assert "7 wide and stride 2" in _C.conv_why_not(planar, code, stem)
            continue
        assert _C.conv_why_not(planar, code, stem) is None
        seven = case.S == 7 and case.stride[1] == 2 and dtype == torch.float32
        assert _C.conv_heuristic(planar, code, 2, not wide)[0] == (stem if wide or not seven else NAMES.index("stem"))
        if not seven:
            assert _C.conv_heuristic(planar, code, 2, False)[0] == stem
        operands = inputs(case, dtype)
        x, w = operands["x"], operands["w"]
        packed = aligned(_C.conv_packed_bytes(planar, code, stem) // 4)
        _C.conv_pack(planar, code, stem, packed.data_ptr(), w.data_ptr(), 0, 1)
        scratch = aligned(_C.conv_scratch_bytes(planar, code, default(stem), 2) // 4)
        y = torch.full((case.N, *case.out, case.K), math.nan, dtype=dtype)
        _C.conv_run(
            planar,
            code,
            default(stem),
            y.data_ptr(),
            x.data_ptr(),
            packed.data_ptr(),
            0,
            0,
            0,
            False,
            scratch.data_ptr(),
            2,
        )
        assert torch.equal(y.permute(0, 3, 1, 2), conv(case, default(stem), x, w))


@pytest.mark.parametrize("name,dtype", [("winograd2", 0), ("winograd4", 0), ("winograd2", 1), ("winograd4x2", 1)])
def test_winograd_refuses_one_channel(name, dtype):
    case = Case(1, 2, 3, 1, 2, 3, 3, pad=(1, 1))
    assert "3 input channels" in _C.conv_why_not(case.sizes, dtype, NAMES.index(name))
    assert NAMES[_C.conv_heuristic(case.sizes, dtype, 1, False)[0]] == "direct"


def test_direct_takes_every_shape():
    assert all(NAMES.index("direct") in algorithms_for(case, dtype) for case in CASES for dtype in DTYPES)
