"""Facts of the compiled code the design relies on, for several cards, without one."""

import csv
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from resnet_fast.bench import gpu_resources as gpu
from resnet_fast.ops.conv2d import triton_tiles

MATRIX = ("gather_gemm", "conv_weight_gradient", "stem_forward", "strided_data_gradient")
#: Kernels that touch every byte of an activation once: all of their accesses to it are as wide as the card allows.
STREAMS = (
    "add_relu_forward", "add_relu_backward", "bn_apply", "bn_backward_apply", "bn_backward_reduce",
    "scale_add_relu_forward", "scale_add_relu_backward", "bn_mean_backward_reduce", "bn_mean_backward_apply",
)  # fmt: skip
#: Kernels with a pipelined loop; of 1x1 layers with one block of channels, which have nothing to overlap, it may be none.
COPIES = ("gather_gemm", "conv_weight_gradient", "stem_forward", "strided_data_gradient")
#: Stores of a program's sums, one value a channel: the only ones that are narrow.
NARROW = {"bn_backward_reduce": 2, "scale_add_relu_backward": 1, "bn_mean_backward_reduce": 2}


def check(launch: gpu.Launch, target) -> None:
    """No spills, shared memory within the card's limit, matrix instructions, asynchronous copies, wide accesses."""
    if launch.kernel.__class__.__name__ != "JITFunction":
        pytest.skip("TRITON_INTERPRET=1: an interpreted kernel has no compiled code")
    found = gpu.resources(gpu.compile_for(launch, target))
    what = f"{launch.name} {gpu.tile_of(launch)} for {target}: {found}"
    assert found["spills"] == 0, what
    assert found["shared"] <= (65536 if isinstance(target, str) else gpu.SHARED[target]), what
    if launch.name in MATRIX:
        assert found["matrix"] > 0, what
        # On gfx942 strided_data_gradient stores its products as they lie, four values (64 bits) a lane.
        as_they_lie = isinstance(target, str) and launch.name == "strided_data_gradient"
        assert found["stores_128"] > 0 or as_they_lie or launch.args.get("out_ptr") is None, what
        size = launch.constants
        # A sum of one block has nothing to overlap.
        once = launch.name == "gather_gemm" and size["U"] * size["V"] * size["CG"] == size["BLOCK_K"]
        if not isinstance(target, str) and not once:
            assert found["async_copies"] > 0, what
    if launch.name in STREAMS and not isinstance(target, str):
        assert found["stores_128"] >= found["stores"] - NARROW.get(launch.name, 0), what
        assert found["loads_128"] > 0, what


def only(launches, *names):
    """The first launch of each name."""
    return [next(launch for launch in launches if launch.name == name) for name in names]


@pytest.mark.parametrize("target", [80, 100])
def test_elementwise(target):
    launches = gpu.elementwise_launches(64, 56, torch.bfloat16)
    for launch in only(launches, "add_relu_forward", "bn_apply", "bn_backward_apply"):
        check(launch, target)


@pytest.mark.parametrize("target", [80, 90])
def test_convolution(target):
    with triton_tiles.architecture(target):
        launches = gpu.convolution_launches(gpu.LAYERS[0], torch.bfloat16)
    for launch in only(launches, *MATRIX[:2]):
        check(launch, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stem_copies_the_image_asynchronously(dtype):
    """Three channels as they are: copies of 4 bytes, no value loaded alone through registers, and no copy of the image."""
    launches = gpu.convolution_launches(gpu.LAYERS[-1], dtype)
    readers = {x.name for x in launches for a in x.args.values() if getattr(a, "shape", ())[2:3] == (224,)}
    assert readers == set(MATRIX[: 3 if dtype == torch.bfloat16 else 2])
    for launch in only(launches, *readers):
        compiled = gpu.compile_for(launch, 80)
        found = gpu.resources(compiled)
        assert found["async_copies"] >= 16 and found["spills"] == 0, (launch.name, found)
        if launch.name != "stem_forward":  # which loads singly where it met NaN
            assert "ld.global.b16" not in compiled.asm["ptx"], launch.name


#: Each generation's own matrix instruction, which Triton must reach from the one source.
INSTRUCTION = {80: "mma.sync.aligned.m16n8k16", 90: "wgmma.mma_async", 100: "tcgen05.mma."}


@pytest.mark.proof
@pytest.mark.parametrize("target", INSTRUCTION)
def test_proof_matrix_instructions(target):
    """Also behind a prologue, which takes the tile through registers, and in the weight gradient, whose tile is transposed."""
    with triton_tiles.architecture(target):
        launches = gpu.convolution_launches(gpu.LAYERS[1], torch.bfloat16)
    prologue = next(x for x in launches if x.name == "gather_gemm" and x.args.get("pre_scale_ptr") is not None)
    for launch in (*only(launches, *MATRIX[:2]), prologue):
        found = gpu.compile_for(launch, target).asm["ptx"]
        assert INSTRUCTION[target] in found and "cp.async" in found, f"{launch.name} {gpu.tile_of(launch)}"


def test_a_norms_backward_stays_in_the_layout_of_the_stores():
    """Its sums over a tile's rows take as few shuffles as the statistics', and z as wide loads as dy has stores."""
    with triton_tiles.architecture(100):
        launches = gpu.convolution_launches(gpu.LAYERS[1], torch.bfloat16)
    launch = next(x for x in launches if x.name == "gather_gemm" and x.args.get("z_ptr") is not None)
    found = gpu.resources(gpu.compile_for(launch, 100))
    assert found["shuffles"] <= 100 and found["spills"] == 0 and found["stores_128"] == found["stores"] - 2, found


def test_statistics_add_few_shuffles():
    """The sums over a tile's rows stay in a thread (the layout of the stores): 64 shuffles, where the sums' own takes 896."""
    with triton_tiles.architecture(100):
        launches = gpu.convolution_launches(gpu.LAYERS[1], torch.bfloat16)
    launch = next(x for x in launches if x.name == "gather_gemm" and x.args.get("part_ptr") is not None)
    found = gpu.resources(gpu.compile_for(launch, 100))
    assert found["shuffles"] <= 100 and found["spills"] == 0, found


@pytest.mark.parametrize("target", [80, 86, 90, 100, "gfx942"])
def test_committed_table(target):
    """It has a line for every kernel and tile that the choosers may pick today, and its figures keep the bars."""
    with open(Path(__file__).parents[2] / "benchmarks/results/triton_resources.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["target"] == str(target)]
    words = ("kernel", "problem", "dtype", "tile", "warps", "stages")
    listed = Counter(tuple(row[w] for w in words) for row in rows)
    now = Counter(
        (launch.name, problem, dtype, gpu.tile_of(launch), str(launch.warps), str(launch.stages))
        for problem, dtype, launch in gpu.all_launches(target)
    )
    assert now == listed, "python -m resnet_fast.bench.gpu_resources writes it anew"
    for row in rows:
        assert int(row["spills"]) == 0, row
        assert int(row["shared"]) <= (65536 if target == "gfx942" else gpu.SHARED[target]), row
        assert int(row["matrix"]) > 0 or row["kernel"] not in MATRIX, row
        if row["kernel"] in STREAMS and target != "gfx942":
            wide = int(row["stores_128"]) >= int(row["stores"]) - NARROW.get(row["kernel"], 0)
            assert int(row["loads_128"]) > 0 and wide, row
        if row["kernel"] in COPIES and row["target"] != "gfx942" and row["stages"] != "1":
            assert int(row["async_copies"]) > 0 or row["problem"].startswith("1x1"), row


@pytest.mark.proof
@pytest.mark.parametrize("target", [80, 90, 100])
def test_proof_every_kernel_and_tile(target):
    """What the committed table has, for 16 bit; the other columns of the table are regenerated by its command."""
    kernels = [launch for _, dtype, launch in gpu.all_launches(target) if dtype == "bf16"]
    assert len(kernels) > 120
    if target != 80:  # of the two forms of a norm's backward, which differ by a product, one
        kernels = [launch for launch in kernels if not launch.constants.get("FIXED")]
    for launch in kernels:
        check(launch, target)


@pytest.mark.proof
@pytest.mark.parametrize("target", [86, "gfx942"])
def test_proof_other_cards(target):
    """Every kernel once, in float16; all their tiles, and the other targets, are in the committed table."""
    kernels = {launch.name: launch for _, dtype, launch in gpu.all_launches(target) if dtype == "fp16"}
    assert len(kernels) >= 24, sorted(kernels)
    for launch in kernels.values():
        check(launch, target)
