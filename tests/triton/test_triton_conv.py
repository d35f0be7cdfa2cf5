"""The compiled convolutions, executed by the simulator: values, races, compulsory bytes, bank conflicts."""

from dataclasses import replace

import pytest
import torch
from cases import FLOATS, check_add_relu, check_bn_act, check_max_pool, random, room
from conv_cases import (
    GEOMETRIES,
    check_backward,
    check_chain,
    check_forward,
    check_fused,
    check_prologue,
    check_statistics,
)

from resnet_fast.ops.conv2d.triton_tiles import Tile, gemm_tiles, use, wgrad_tiles


@pytest.mark.parametrize(
    "name, dtype, order", [("3x3", torch.bfloat16, 3), ("1x1", torch.float32, -1), ("stem", torch.float16, 0)]
)
def test_forward(simulator, name, dtype, order):
    with simulator.running(order):
        check_fused(name, dtype)


@pytest.mark.parametrize("name, dtype, order", [("3x3 stride 2", torch.float16, 4), ("1x1", torch.bfloat16, -1)])
def test_backward(simulator, name, dtype, order):
    with simulator.running(order):
        check_backward(name, dtype)


def test_statistics(simulator):
    with simulator.running(5):
        check_statistics("3x3", torch.bfloat16)


@pytest.mark.parametrize(
    "name, dtype, order", [("3x3", torch.bfloat16, 3), ("1x1", torch.float16, -1), ("3x3 stride 2", torch.float32, 7)]
)
def test_prologue(simulator, name, dtype, order):
    with simulator.running(order):
        check_prologue(name, dtype)


def test_prologue_and_statistics(simulator):
    with simulator.running(4):
        check_chain("3x3", torch.bfloat16)


def test_split(simulator):
    with simulator.running(2), use(Tile(32, 32, 16, split=3)):
        check_fused("3x3", torch.bfloat16)


def test_compulsory_bytes(simulator):
    """A fused 3x3 convolution reads input, weights and residual and writes the output once; conflict-free."""
    x, weight = random((1, 64, 12, 12), torch.bfloat16, 0), random((64, 64, 3, 3), torch.bfloat16, 1)
    residual, vectors = random((1, 64, 12, 12), torch.bfloat16, 2), [torch.ones(64) for _ in range(4)]
    window = ([1, 1], [1, 1], [1, 1], 1)
    with simulator.running() as reports, use(Tile(64, 64, 64, 4, 3)):
        room("conv_bn_act").fwd(x, weight, None, *vectors, residual, 1e-5, True, *window)
    report = dict(reports)["gather_gemm"]
    floor = 2 * x.numel() + 2 * weight.numel() + 2 * residual.numel() + 2 * 4 * 64
    assert report.counters["distinct_read_bytes"] == floor
    assert report.counters["distinct_write_bytes"] == 2 * x.numel()
    assert report.counters["bank_conflicts"] == 0
    assert report.unwritten("out_ptr") == 0
    flops = 2 * 144 * 64 * 64 * 9
    assert flops <= report.counters["mma_flops"] <= 192 / 144 * flops  # 144 rows in tiles of 64


def test_sectors_are_the_tiles(simulator):
    """Every program reads its rows and columns once, whole sectors, and writes its tile once: no more and no less."""
    x, weight = random((1, 64, 16, 16), torch.bfloat16, 0), random((128, 64, 1, 1), torch.bfloat16, 1)
    with simulator.running() as reports, use(Tile(64, 64, 64, 4, 3)):
        room("conv2d").fwd(x, weight, None, [1, 1], [0, 0], [1, 1], 1)
    counters = dict(reports)["gather_gemm"].counters
    programs, sector = 4 * 2, 32
    assert counters["global_load_sectors"] == programs * (64 + 64) * 64 * 2 // sector
    assert counters["global_store_sectors"] == 256 * 128 * 2 // sector
    assert counters["bank_conflicts"] == 0


def test_compulsory_bytes_of_the_prologue(simulator):
    """The norm's input is read in place of the activation, which is never written; its vectors beside it."""
    z, weight = random((1, 64, 12, 12), torch.bfloat16, 0), random((64, 64, 3, 3), torch.bfloat16, 1)
    ones = torch.ones(64)
    with simulator.running() as reports, use(Tile(64, 64, 64, 4, 3)):
        room("bn_act_conv2d").fwd(z, ones, ones, ones, ones, weight, None, False, 1e-5, [1, 1], [1, 1], [1, 1], 1)
    report = dict(reports)["gather_gemm"]
    assert report.counters["distinct_read_bytes"] == 2 * z.numel() + 2 * weight.numel() + 3 * 4 * 64
    assert report.counters["distinct_write_bytes"] == 2 * z.numel()
    assert set(dict(reports)) == {"norm_vectors", "gather_gemm"}


@pytest.mark.proof
def test_proof_predicted_order_of_a_chain(simulator):
    """A prediction from counted bytes and instructions, never a time: each fusion lowers the least time on every card."""
    z, weight = random((4, 64, 28, 28), torch.bfloat16, 0), random((64, 64, 1, 1), torch.bfloat16, 1)
    window = ([1, 1], [0, 0], [1, 1], 1)

    def reports(run):
        with simulator.running() as found:
            run()
        return [report for _, report in found]

    def parts():
        mean, var = room("bn_act").statistics(z)
        y = room("bn_act").fwd(z, None, None, mean, var, None, False, 1e-5, True)[0]
        room("bn_act").statistics(room("conv2d").fwd(y, weight, None, *window))

    def epilogue():
        mean, var = room("bn_act").statistics(z)
        y = room("bn_act").fwd(z, None, None, mean, var, None, False, 1e-5, True)[0]
        room("conv2d").forward_statistics(y, weight, None, *window)

    def prologue():
        mean, var = room("bn_act").statistics(z)
        before = room("conv2d").prologue(None, None, mean, var, 1e-5)
        room("conv2d").forward_statistics(z, weight, None, *window, before)

    chains = [(f.__name__, reports(f)) for f in (parts, epilogue, prologue)]
    for card in ("A100", "H100", "L4"):
        bytes_ = {}
        for name, found in chains:
            predicted = [simulator.ptxsim.predict(r, gpu=card) for r in found]
            bytes_[name] = sum(p["dram"].at_least_us for p in predicted)
        assert bytes_["prologue"] < bytes_["epilogue"] < bytes_["parts"], (card, bytes_)


def every_tile(bytes_, ieee=False):
    """All tiles the chooser may pick for large problems, as the problems' sizes vary."""
    found = set()
    for n in (64, 128, 512):
        for m in (256, 6272, 200704):
            found |= set(gemm_tiles(m, n, 4608, 512, bytes_, ieee, 108, 1, 80))
    return sorted(found, key=str)


@pytest.mark.proof
@pytest.mark.parametrize("tile", every_tile(2), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_proof_tiles(simulator, tile, dtype):
    with simulator.running(6), use(tile):
        check_fused(((2, 64, 9, 11), (128, 64, 3, 3), 1, 1, 1, 1), dtype)
        check_fused(((2, 128, 9, 11), (128, 128, 1, 1), 1, 0, 1, 1), dtype)
        check_backward(((1, 64, 9, 11), (64, 64, 3, 3), 1, 1, 1, 1), dtype, (True, False, False))
    with simulator.running(6), use(replace(tile, split=1)):  # statistics are never split; a split adds in another order
        check_statistics(((2, 64, 9, 11), (128, 64, 3, 3), 1, 1, 1, 1), dtype)
        check_chain(((2, 64, 9, 11), (128, 64, 3, 3), 1, 1, 1, 1), dtype)
        check_prologue(((2, 128, 9, 11), (128, 128, 1, 1), 1, 0, 1, 1), dtype)


@pytest.mark.proof
@pytest.mark.parametrize("tile", every_tile(4), ids=str)
def test_proof_tiles_float32(simulator, tile):
    with simulator.running(8), use(tile):
        check_fused(((2, 64, 9, 11), (128, 64, 3, 3), 1, 1, 1, 1), torch.float32)
        check_backward(((1, 64, 9, 11), (64, 64, 3, 3), 1, 1, 1, 1), torch.float32, (True, False, False))
        check_prologue(((2, 64, 9, 11), (128, 64, 3, 3), 1, 1, 1, 1), torch.float32)


def every_wgrad_tile(bytes_, taps):
    """All tiles of the weight gradient."""
    found = set()
    for k in (64, 128, 512):
        found |= set(wgrad_tiles(k, k, 6272, 3 if taps == 3 else 1, taps, bytes_, False, 4, 80))
    return sorted(found, key=str)


@pytest.mark.proof
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("taps", [1, 3])
def test_proof_weight_gradient_tiles(simulator, dtype, taps):
    filters = (128, 128, taps, taps)
    for tile in every_wgrad_tile(dtype.itemsize, taps):
        with simulator.running(8), use(Tile(tile.m, tile.n, tile.k, tile.warps, tile.stages, 2)):
            check_backward(((2, 128, 9, 11), filters, 1, taps // 2, 1, 1), dtype, (False, True, False))


@pytest.mark.proof
@pytest.mark.parametrize("name, dtype", list(zip(GEOMETRIES, FLOATS[::-1] * 7)))  # the dtypes in turn
def test_proof_geometries(simulator, name, dtype):
    with simulator.running(len(name)):
        check_forward(name, dtype, seed=7)
        check_fused(name, dtype, residual=False, seed=8)
        check_backward(name, dtype, seed=9)
        check_prologue(name, dtype, training=False, seed=10)


@pytest.mark.proof
def test_proof_full_precision(simulator, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with simulator.running(1):
        for name in ("3x3", "3x3 stride 2", "1x1", "stem"):
            check_fused(name, torch.float32)
            check_backward(name, torch.float32)


@pytest.mark.proof
def test_proof_sizes_of_one(simulator):
    """Arguments equal to 1 become constants of the compilation."""
    with simulator.running(3):
        check_bn_act((1, 16, 1, 1), torch.float32, residual=True, training=False)
        check_bn_act((1, 16, 1, 2), torch.bfloat16, residual=True)
        check_add_relu((1, 1, 1, 1), torch.float32)
        check_max_pool((1, 16, 1, 1), torch.float32, (3, 3), (2, 2), (1, 1))
        for x, filters in (
            ((1, 16, 1, 1), (16, 16, 1, 1)),
            ((1, 16, 3, 3), (1, 16, 3, 3)),
            ((1, 1, 3, 3), (1, 1, 3, 3)),
        ):
            check_fused((x, filters, 1, 0, 1, 1), torch.bfloat16)
            check_backward((x, filters, 1, 0, 1, 1), torch.bfloat16)


@pytest.mark.proof
def test_proof_stem_reads_any_strides(simulator):
    x, weight = random((2, 3, 18, 22), torch.bfloat16, 0), random((16, 3, 7, 7), torch.bfloat16, 1)
    window = ([2, 2], [3, 3], [1, 1], 1)
    expected = room("conv2d").fwd
    with simulator.running(3):
        first = expected(x, weight, None, *window)
        assert torch.equal(first, expected(x.contiguous(), weight.contiguous(), None, *window))
        part = x[:, :, 1:, ::2]
        assert torch.equal(expected(part, weight, None, *window), expected(part.contiguous(), weight, None, *window))


@pytest.mark.proof
def test_proof_statistics_merge_in_two_levels(simulator, monkeypatch):
    from resnet_fast.ops.bn_act import triton as bn

    monkeypatch.setattr(bn, "MERGE", (2, 16))
    with simulator.running(1), use(Tile(32, 32, 16)):
        check_statistics(((4, 16, 17, 19), (24, 16, 3, 3), 1, 1, 1, 1), torch.float32)
