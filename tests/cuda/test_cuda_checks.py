"""The tests' own teeth: bugs planted in the kernels are caught. And what a launch must refuse."""

from __future__ import annotations

import pytest
import torch
from cuda_law import assert_lawful, images

from resnet_fast import _native
from resnet_fast.ops import cuda_room
from resnet_fast.ops.add_relu import cuda as add_relu
from resnet_fast.ops.bn_act import cuda as bn_act


def test_a_missing_barrier_is_caught(card, simulated):
    card.defines = ("RF_PLANT_MISSING_BARRIER",)
    x = images(2, 64, 9, 9, seed=1)
    with pytest.raises(simulated.SimError, match="race-shared"):
        card.run(bn_act.fwd, x, None, None, None, None, None, True, 1e-5, True, passes=1)


def test_an_element_too_few_is_caught(card):
    card.defines = ("RF_PLANT_OFF_BY_ONE",)
    x, residual = images(1, 3, 5, 7, seed=2), images(1, 3, 5, 7, seed=3)  # 105 elements: 26 packs and a tail of one
    with pytest.raises(AssertionError, match="4 bytes of an output"):
        card.run(add_relu.fwd, x, residual)
    card.check = False
    y = card.run(add_relu.fwd, x, residual)
    with pytest.raises(AssertionError):
        assert_lawful(y, torch.relu(x + residual), torch.relu(x.double() + residual.double()))


def test_a_grid_that_is_not_resident_is_caught(card, simulated):
    """A grid barrier whose blocks do not all run at once never opens."""
    card.options = {"coresident": 2}
    x = images(2, 64, 16, 16, seed=4)
    with pytest.raises(simulated.SimError, match="budget"):
        card.run(bn_act.fwd, x, None, None, None, None, None, True, 1e-5, True, passes=2)
    assert card.sms * 2 > 2


def test_one_pass_never_asks_for_more_than_the_card_has(simulated):
    """The geometry of the cooperative kernel on real cards' sizes, without running it."""
    cards = {"A100": (108, 163, 164), "H100": (132, 227, 228), "L4": (58, 99, 100), "B200": (148, 227, 228)}
    module = _native.cuda_module()
    largest = {}
    for name, (sms, block, multiprocessor) in cards.items():
        launches = []
        module.hook_launches(
            lambda *launch, seen=launches: seen.append(launch), sms, block * 1024, multiprocessor * 1024
        )
        try:
            for channels in (64, 256, 512, 2048):
                for rows in (49, 392, 3136, 5000, 12544, 20000, 25088, 100352, 160000, 802816):
                    launches.clear()
                    module.bn_act_training(-1, 0, 1, *[0] * 8, rows, channels, 1e-5, True, 0)
                    if not launches[0][4]:
                        assert len(launches) == 3
                        continue
                    (_, grid, threads, shared, _, _) = launches[0]
                    static = 20 * 1024
                    assert grid <= 2 * sms and threads == 256
                    assert (
                        shared + static <= block * 1024 + 1024 and 2 * (shared + static) <= multiprocessor * 1024 + 2048
                    )
                    assert grid * shared >= rows * channels * 2, "x fits the blocks' shared memory"
                    largest[name] = max(largest.get(name, 0), rows * channels * 2)
        finally:
            module.hook_launches(None)
    assert largest["A100"] >= 12e6 and largest["H100"] >= 20e6 and largest["B200"] >= largest["H100"]


def test_grids_of_more_than_two_to_the_31_elements(simulated):
    """Index arithmetic, without the memory: the blocks of the largest tensors cover them and nothing overflows."""
    launches = []
    module = _native.cuda_module()
    module.hook_launches(lambda *launch: launches.append(launch), 132)
    try:
        size = 2**33 + 8
        module.add_relu(-1, 0, 1, 0, 0, 0, size)
        grid = launches[-1][1]
        assert (grid - 1) * 256 * 4 * 8 < size <= grid * 256 * 4 * 8
        rows = 2**36
        module.bn_act_inference(-1, 0, 1, *[0] * 7, rows, 64, 1e-5, True)
        grid, arguments = launches[-1][1], launches[-1][5]
        chunk_rows = int.from_bytes(arguments[-32:-24], "little")
        assert rows == int.from_bytes(arguments[-40:-32], "little")
        assert grid == 264 and (grid - 1) * chunk_rows < rows <= grid * chunk_rows
        batch = 70000  # beyond the 65535 of a grid's other axes
        module.max_pool2d(-1, 0, 1, *[0] * 7, batch, 112, 112, 64, 56, 56, 0.0, (3, 3, 2, 2, 1, 1, 1, 1))
        assert launches[-1][1] == batch * 56 * 2
        with pytest.raises(ValueError, match=r"a grid of 2240000000000 blocks, wanted 1 to 2\^31 - 1"):
            module.max_pool2d(-1, 0, 1, *[0] * 7, 2 * 10**10, 112, 112, 64, 56, 56, 0.0, (3, 3, 2, 2, 1, 1, 1, 1))
    finally:
        module.hook_launches(None)


def test_misaligned_pointers_are_refused(simulated):
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        _native.cuda_module().add_relu(-1, 0, 0, 16, 32, 4, 8)


def test_an_unknown_dtype_is_refused(simulated):
    with pytest.raises(ValueError, match="dtype 7, wanted 0"):
        _native.cuda_module().add_relu(-1, 0, 7, 16, 32, 48, 8)


def test_reasons():
    x = torch.zeros(2, 3, 4, 4)
    assert cuda_room.why_not(x) == "the cuda room wants CUDA tensors, got one on cpu"
    shape_why_not = cuda_room.shape_why_not
    assert shape_why_not([x.double()], []) == "the cuda room takes float32, bfloat16 and float16, got torch.float64"
    assert shape_why_not([x, x.half()], []) == "the cuda room wants one dtype, got torch.float32 and torch.float16"
    assert shape_why_not([x[:0]], []) == "the cuda room leaves empty tensors to eager"
    assert "per-channel vectors" in shape_why_not([x], [torch.zeros(3).double()])
    assert shape_why_not([x.half()], [torch.zeros(3)]) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_without_a_card_there_is_a_sentence_not_a_crash(simulated):
    assert "torch finds no card here" in _native.cuda_why_not()
    module = _native.cuda_module()
    assert module.device_count() == 0 and module.why_no_device()
    with pytest.raises(RuntimeError, match="resnet_fast: CUDA error cuda"):
        module.add_relu(-1, 0, 0, 16, 32, 48, 8)
