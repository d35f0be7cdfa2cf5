"""Facts of the compiled code the design relies on, for several cards, without one."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from resnet_fast.bench import gpu_resources as gpu
from resnet_fast.ops.conv2d import triton_tiles

MATRIX = ("gather_gemm", "conv_weight_gradient")
#: Kernels that touch every byte of an activation once: all of their accesses to it are as wide as the card allows.
STREAMS = ("add_relu_forward", "add_relu_backward", "bn_apply", "bn_backward_apply", "bn_backward_reduce")


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
        assert found["stores_128"] > 0 or launch.args.get("out_ptr") is None, what
        if not isinstance(target, str):
            assert found["async_copies"] > 0, what
    if launch.name in STREAMS and not isinstance(target, str):
        assert found["stores_128"] == found["stores"] or launch.name == "bn_backward_reduce", what
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
    for launch in only(launches, *MATRIX):
        check(launch, target)


def test_stem_copies_16_bytes_asynchronously():
    launches = gpu.convolution_launches(gpu.LAYERS[7], torch.bfloat16)
    found = gpu.resources(gpu.compile_for(only(launches, "gather_gemm")[0], 80))
    assert found["async_copies"] >= 48 and found["loads_128"] >= found["async_copies"] and found["registers"] <= 168


@pytest.mark.proof
@pytest.mark.parametrize("target", [80, 86, 90, 100, "gfx942"])
def test_proof_every_kernel_and_tile(target):
    kernels = 0
    for _, _, launch in gpu.all_launches(target):
        check(launch, target)
        kernels += 1
    assert kernels > 80
