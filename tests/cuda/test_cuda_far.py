"""Offsets beyond 2^31 elements and 2^32 bytes, executed without the memory.

The kernel is told of a tensor of which only the end exists: base addresses lie as far before it as the missing part is
large, and only the last block runs. An index that wrapped would leave the tensor, which is an error.
"""

from __future__ import annotations

import importlib
import struct

import pytest
import torch
from conftest import find_kernel
from cuda_law import images

from resnet_fast import _native
from resnet_fast.ops.max_pool2d import eager as pool_eager


@pytest.fixture
def far(simulated, monkeypatch):
    """run(name, tensors with their missing bytes, other arguments, sms): executes the last block of the last launch."""
    launch_module = importlib.import_module("ptxsim.launch")
    missing: dict[int, int] = {}

    class Arena(launch_module.Arena):
        placed = False

        def __init__(self, *args):
            super().__init__(*args)
            self.placed = True

        def addr(self, t):
            return super().addr(t) - (missing.get(t.data_ptr(), 0) if self.placed else 0)

    monkeypatch.setattr(launch_module, "Arena", Arena)

    def run(call, tensors, sms=108, last=1):
        by_address = {}
        for t, before in tensors:
            missing[t.data_ptr()] = before
            by_address[(t.data_ptr() - before) % 2**64] = t
        launches = []
        _native.cuda_module().hook_launches(lambda *launch: launches.append(launch), sms)
        try:
            call(*[(t.data_ptr() - before) % 2**64 for t, before in tensors])
        finally:
            _native.cuda_module().hook_launches(None)
        kernel, grid, block, shared, _, arguments = launches[-1]
        _, text, entry = find_kernel(kernel, ())
        words = [struct.unpack_from("<Q", arguments, at)[0] for at in range(0, len(arguments), 8)]
        items = {8 * i: ("P", by_address[w]) if w in by_address else ("Q", w) for i, w in enumerate(words)}
        packed = simulated.Packed(len(arguments), items)
        report = simulated.launch(text, entry, grid, block, [packed], shared, ctas=range(grid - last, grid))
        return report.check()

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_add_relu(far, dtype):
    here, size = 2048 + 13, 2**33 + 2048 + 13
    x, residual, y = torch.randn(here).to(dtype), torch.randn(here).to(dtype), torch.full((here,), 7.0, dtype=dtype)
    before = (size - here) * dtype.itemsize
    assert before % 16 == 0

    def call(*addresses):
        _native.cuda_module().add_relu(-1, 0, int(dtype == torch.bfloat16), *addresses, size)

    far(call, [(y, before), (x, before), (residual, before)])
    wanted = torch.relu(x + residual)
    done = y != 7
    assert done[-1] and done.sum() >= 13 and torch.equal(y[done], wanted[done])


def test_bn_apply(far):
    channels, rows, sms = 64, 2**31 + 77, 2**20
    chunk = -(-rows // (2 * sms))
    here = rows - (-(-rows // chunk) - 1) * chunk
    x, y = torch.randn(here, channels), torch.full((here, channels), 7.0)
    mean, var = torch.randn(channels), torch.rand(channels) + 0.5
    before = (rows - here) * channels * 4

    def call(y, x, mean, var):
        _native.cuda_module().bn_act_inference(-1, 0, 0, y, x, 0, 0, 0, mean, var, rows, channels, 1e-5, True)

    far(call, [(y, before), (x, before), (mean, 0), (var, 0)], sms)
    torch.testing.assert_close(y, torch.relu((x - mean) / (var + 1e-5).sqrt()))


def test_max_pool2d(far):
    images_, side, channels = 70000, 112, 64
    window = (3, 3, 2, 2, 1, 1, 1, 1)
    x = images(1, channels, side, side, torch.bfloat16, seed=1)
    y = torch.empty(1, channels, 56, 56, dtype=torch.bfloat16).to(memory_format=torch.channels_last).fill_(7.0)
    places = torch.empty_like(y, dtype=torch.uint8).fill_(77)
    before = [(images_ - 1) * t.numel() * t.element_size() for t in (y, places, x)]

    def call(y, places, x):
        sizes = (images_, side, side, channels, 56, 56)
        _native.cuda_module().max_pool2d(-1, 0, 1, y, places, x, 0, 0, 0, 0, *sizes, 0.0, window)

    far(call, list(zip((y, places, x), before)), last=2 * 56)
    wanted = pool_eager.fwd(x, [3, 3], [2, 2], [1, 1], [1, 1], [56, 56], True)
    assert torch.equal(y, wanted[0]) and torch.equal(places, wanted[1])
