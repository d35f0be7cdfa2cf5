"""The compiled convolutions, executed by the simulator: values, races, compulsory bytes, bank conflicts."""

from dataclasses import replace

import pytest
import torch
from cases import FLOATS, check_add_relu, check_bn_act, check_floor, check_max_pool, random, room
from conv_cases import (
    GEOMETRIES,
    STEMS,
    check_backward,
    check_chain,
    check_folded,
    check_forward,
    check_fused,
    check_prologue,
    check_prologue_backward,
    check_statistics,
    check_stem,
    every_tile,
)

from resnet_fast.ops.conv2d.triton_tiles import Tile, use, way, wgrad_tiles


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


@pytest.mark.parametrize(
    "name, dtype, order", [("3x3", torch.float16, 3), ("1x1", torch.bfloat16, -1), ("3x3 stride 2", torch.float32, 7)]
)
def test_prologue_backward(simulator, name, dtype, order):
    with simulator.running(order):
        check_prologue_backward(name, dtype, order > 0)


def test_prologue_and_statistics(simulator):
    with simulator.running(4):
        check_chain("3x3", torch.bfloat16)


@pytest.mark.parametrize("name, dtype, order", [("7x7", torch.bfloat16, 3), ("3x3", torch.float16, -1)])
def test_stem(simulator, name, dtype, order):
    with simulator.running(order):
        check_stem(name, dtype, nan=True)


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


def valid_rows(pixels, taps):
    """How often a pixel of a map meets a tap inside it, over all taps of a filter that keeps the map's size."""
    return sum((pixels - abs(r - taps // 2)) * (pixels - abs(s - taps // 2)) for r in range(taps) for s in range(taps))


def check_gather_sectors(simulator, tile, dtype):
    """A 3x3 filter: a row once a tap that is inside the image, for every tile of columns, and all filters for every tile of
    rows; whole sectors, and none for the border."""
    x, weight = random((1, 64, 16, 16), dtype, 0), random((128, 64, 3, 3), dtype, 1)
    weight = weight.contiguous(memory_format=torch.channels_last)
    with simulator.running() as reports, use(replace(tile, split=1)):
        room("conv2d").fwd(x, weight, None, [1, 1], [1, 1], [1, 1], 1)
    counters, sectors = dict(reports)["gather_gemm"].counters, 64 * dtype.itemsize // 32
    loads = (128 // tile.n) * valid_rows(16, 3) * sectors + (256 // tile.m) * 128 * 9 * sectors
    assert counters["global_load_sectors"] == loads and counters["bank_conflicts"] == 0
    assert counters["global_store_sectors"] == 256 * 128 * dtype.itemsize // 32


def check_wgrad_sectors(simulator, tile, dtype, taps):
    """The weight gradient: dy once for every tile of columns and row of taps, x once a tap for every tile of filters."""
    x, dy = random((1, 128, 16, 16), dtype, 0), random((1, 128, 16, 16), dtype, 1)
    weight = random((128, 128, taps, taps), dtype, 2)
    with simulator.running() as reports, use(replace(tile, split=2)):
        room("conv2d").weight_gradient(dy, x, weight, [1, 1], [taps // 2] * 2, [1, 1], 1)
    check_floor(reports)
    counters, sectors = dict(reports)["conv_weight_gradient"].counters, 128 * dtype.itemsize // 32
    loads = 256 * sectors * (128 // tile.n) * taps + (128 // tile.m) * valid_rows(16, taps) * sectors
    assert counters["global_load_sectors"] == loads, (tile, counters["global_load_sectors"], loads)
    assert counters["global_store_sectors"] == 2 * 128 * 128 * taps * taps * 4 // 32  # float32 parts


def check_sectors(simulator, tile, dtype):
    """Every program reads its rows and columns once, whole sectors, and writes its tile once: no more and no less."""
    x, weight = random((1, 64, 16, 16), dtype, 0), random((128, 64, 1, 1), dtype, 1)
    with simulator.running() as reports, use(replace(tile, split=1)):
        room("conv2d").fwd(x, weight, None, [1, 1], [0, 0], [1, 1], 1)
    counters = dict(reports)["gather_gemm"].counters
    programs, sector, bytes_ = (256 // tile.m) * (128 // tile.n), 32, dtype.itemsize
    assert counters["global_load_sectors"] == programs * (tile.m + tile.n) * 64 * bytes_ // sector
    assert counters["global_store_sectors"] == 256 * 128 * bytes_ // sector
    check_floor(reports)


def test_sectors_are_the_tiles(simulator):
    check_sectors(simulator, Tile(64, 64, 64, 4, 3), torch.bfloat16)
    check_gather_sectors(simulator, Tile(64, 128, 64, 4, 3), torch.bfloat16)
    check_wgrad_sectors(simulator, Tile(64, 64, 64, 4, 3), torch.bfloat16, 3)


def test_compulsory_bytes_of_a_strided_data_gradient(simulator):
    """All residue classes in one launch: dy and the filters are read once, and every input pixel is written, once."""
    dy, weight = random((1, 64, 6, 7), torch.bfloat16, 0), random((64, 32, 3, 3), torch.bfloat16, 1)
    x = random((1, 32, 12, 13), torch.bfloat16, 2)
    with simulator.running(5) as reports:
        dx, _ = room("conv2d").data_gradient(
            dy, x, weight.to(memory_format=torch.channels_last), [2, 2], [1, 1], [1, 1], 1
        )
    ((name, report),) = reports
    assert name == "strided_data_gradient"
    assert report.counters["distinct_read_bytes"] == 2 * dy.numel() + 2 * weight.numel()
    assert report.counters["distinct_write_bytes"] == 2 * dx.numel() and report.unwritten("out_ptr") == 0


def test_compulsory_bytes_of_the_stem(simulator):
    """The image and the filters are read once, the pooled map is written once, and there is nothing between."""
    x, weight = random((1, 3, 28, 28), torch.bfloat16, 0), random((64, 3, 7, 7), torch.bfloat16, 1)
    pool, vectors = [3, 3, 2, 2, 1, 1, 1, 1, 7, 7], [torch.ones(64) for _ in range(4)]
    norm = (None, *vectors, None, False, 1.0, 1e-5, True)
    with simulator.running() as reports:
        y = room("recomputed_conv_bn_act").fwd(
            x, *(None,) * 4, weight, *norm, [2, 2], [3, 3], [1, 1], 1, pool
        )  # fmt: skip
    report = dict(reports)["stem_forward"]
    filters = 2 * 2 * 64 * 7 * 32  # for both columns of a window, in blocks of 32 values
    assert report.counters["distinct_read_bytes"] == 2 * x.numel() + filters + 2 * 4 * 64
    assert report.counters["distinct_write_bytes"] == 2 * y.numel() and report.unwritten("y_ptr") == 0
    assert set(dict(reports)) == {"fold_norm", "window_filters", "stem_forward"}
    assert report.counters["bank_conflicts"] == 0


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


@pytest.mark.parametrize("training", [True, False])
def test_compulsory_bytes_of_the_norms_backward(simulator, training):
    """The filters' gradient reads z in place of the activation; the data gradient reads z beside what it needs for itself, and
    with known statistics that is all: the activation and its gradient are never in memory."""
    z, weight = random((1, 64, 12, 12), torch.bfloat16, 0), random((64, 64, 3, 3), torch.bfloat16, 1)
    weight, vectors = weight.contiguous(memory_format=torch.channels_last), [torch.ones(64) for _ in range(4)]
    given = (z, z.clone(), *vectors, weight, False, training, 1e-5, [1, 1], [1, 1], [1, 1], 1)
    with simulator.running(5) as reports, use(Tile(64, 64, 64, 4, 3)), way("prologue"):
        room("bn_act_conv2d").bwd(*given, [True, True, True, True, False])
    found, vectors, map_ = dict(reports), 3 * 4 * 64, 2 * z.numel()
    apply = ["bn_backward_apply"] if training else []
    assert list(found) == ["norm_vectors", "conv_weight_gradient", "gather_gemm", "bn_backward_merge", *apply]
    counters = found["conv_weight_gradient"].counters
    assert counters["distinct_read_bytes"] == 2 * map_ + vectors
    counters = found["gather_gemm"].counters
    assert counters["distinct_read_bytes"] == 2 * map_ + 2 * weight.numel() + vectors
    assert counters["distinct_write_bytes"] == map_ + 2 * 3 * 4 * 64  # and two sums of each of 3 tiles of 64 rows
    assert counters["bank_conflicts"] == 0
    if training:
        counters = found["bn_backward_apply"].counters
        assert counters["distinct_read_bytes"] == 2 * map_ + 6 * 4 * 64
        assert counters["distinct_write_bytes"] == map_


def check_tile(simulator, tile, dtype, order):
    """Every form of the kernels in a tile: values by the law, no issue, whole tensors once, no bank conflicts."""
    with simulator.running(order) as reports, use(tile):
        check_fused(((2, 64, 9, 11), (128, 64, 3, 3), 1, 1, 1, 1), dtype)
        check_fused(((2, 128, 9, 11), (128, 128, 1, 1), 1, 0, 1, 1), dtype)
        check_folded(((2, 128, 9, 11), (128, 128, 1, 1), 1, 0, 1, 1), dtype)
        check_backward(((1, 64, 9, 11), (64, 64, 3, 3), 1, 1, 1, 1), dtype, (True, False, False))
        check_backward(((1, 64, 9, 11), (64, 64, 3, 3), 2, 1, 1, 1), dtype, (True, False, False))
        check_prologue(((2, 64, 9, 11), (128, 64, 3, 3), 1, 1, 1, 1), dtype)
        check_floor(reports)
    with simulator.running(order + 1) as reports, use(replace(tile, split=1)):
        # Statistics are never split; a split adds in another order.
        check_statistics(((2, 64, 9, 11), (128, 64, 3, 3), 1, 1, 1, 1), dtype)
        check_chain(((2, 64, 9, 11), (128, 64, 3, 3), 1, 1, 1, 1), dtype)
        check_prologue(((2, 128, 9, 11), (128, 128, 1, 1), 1, 0, 1, 1), dtype)
        check_floor(reports)
    if tile.split > 1:  # the norm's backward never is; it has fewer sums a thread
        return
    known, wants, size = order % 2 == 0, (True, True, True, False, False), tile.m * tile.n
    wide = replace(tile, warps=4 if size <= 4096 else 8)
    with simulator.running(order + 2) as reports:
        if size <= min(2048 * tile.warps, 8192 if dtype == torch.float32 else 16384):
            with use(tile):
                check_prologue_backward(((1, 64, 9, 11), (64, 64, 3, 3), 1, 1, 1, 1), dtype, True, wants=wants)
        if size <= 8192:
            with use(wide):
                check_prologue_backward(((1, 128, 9, 11), (64, 128, 1, 1), 1, 0, 1, 1), dtype, False, wants=wants)
        if size <= (8192 if known or dtype == torch.float32 else 16384):
            with use(wide):
                check_prologue_backward(((1, 64, 9, 11), (64, 64, 3, 3), 2, 1, 1, 1), dtype, not known, wants=wants)
        check_floor(reports)


def test_tile(simulator, order):
    check_tile(simulator, Tile(64, 64, 64, 4, 3), torch.float16, order)


@pytest.mark.proof
@pytest.mark.parametrize("tile", every_tile(2), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_proof_tiles(simulator, tile, dtype, order):
    check_tile(simulator, tile, dtype, order)


@pytest.mark.proof
@pytest.mark.parametrize("tile", every_tile(4), ids=str)
def test_proof_tiles_float32(simulator, tile, order):
    """tf32."""
    check_tile(simulator, tile, torch.float32, order)


@pytest.mark.proof
@pytest.mark.parametrize("dtype", FLOATS)
def test_proof_sectors_of_every_tile(simulator, dtype):
    for tile in every_tile(dtype.itemsize):
        check_sectors(simulator, tile, dtype)
        check_gather_sectors(simulator, tile, dtype)


def every_wgrad_tile(bytes_, taps, prologue=False, arch=80):
    """All tiles of the weight gradient."""
    found = set()
    for k in (64, 128, 512):
        found |= set(wgrad_tiles(k, k, 6272, 3 if taps == 3 else 1, taps, bytes_, False, 4, arch, prologue))
    return sorted(found, key=str)


@pytest.mark.proof
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("taps", [1, 3])
def test_proof_weight_gradient_tiles(simulator, dtype, taps, order):
    filters = (128, 128, taps, taps)
    for tile in every_wgrad_tile(dtype.itemsize, taps):
        for split in (1, 2):
            with simulator.running(order) as reports, use(replace(tile, split=split)):
                check_backward(((2, 128, 9, 11), filters, 1, taps // 2, 1, 1), dtype, (False, True, False))
                check_floor(reports)
        check_wgrad_sectors(simulator, tile, dtype, taps)


@pytest.mark.proof
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("taps", [1, 3])
def test_proof_weight_gradient_tiles_with_a_prologue(simulator, dtype, taps, order):
    """Those of this architecture; in float16 the larger ones of newer cards, too."""
    wants = (False, False, False, True, False)
    architectures = (80, 90) if dtype == torch.float16 else (80,)
    tiles = dict.fromkeys(t for arch in architectures for t in every_wgrad_tile(dtype.itemsize, taps, True, arch))
    for i, tile in enumerate(tiles):
        with simulator.running(order + i) as reports, use(replace(tile, split=1 + i % 2)):  # both sums in one order
            check_prologue_backward(
                ((1, 128, 7, 9), (128, 128, taps, taps), 1, taps // 2, 1, 1), dtype, wants=wants, bitwise=True
            )
            check_floor(reports)


@pytest.mark.proof
@pytest.mark.parametrize("name, dtype", list(zip(GEOMETRIES, FLOATS[::-1] * 7)))  # the dtypes in turn
def test_proof_geometries(simulator, name, dtype):
    with simulator.running(len(name)):
        check_forward(name, dtype, seed=7)
        check_fused(name, dtype, residual=False, seed=8)
        check_backward(name, dtype, seed=9)
        check_prologue(name, dtype, training=False, seed=10)
        check_prologue_backward(name, dtype, seed=11)


@pytest.mark.proof
@pytest.mark.parametrize("name, dtype", list(zip(STEMS, FLOATS[1:] * 3)))
def test_proof_stem(simulator, name, dtype):
    for order in (0, 11):
        with simulator.running(order):
            check_stem(name, dtype, seed=order)
            check_stem(name, dtype, ceil=True, affine=False, nan=True, seed=order + 20)


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
