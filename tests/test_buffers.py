"""Large outputs of the C++ rooms live in memory that is kept for reuse (csrc/buffers.h)."""

from __future__ import annotations

import gc

import pytest
import torch

from resnet_fast import _native
from resnet_fast.ops import common

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason="the compiled module is not built")
SHAPE = (2, 64, 128, 128)  # 8 MiB of float32


def test_an_output_as_any_other():
    for dtype in (torch.float32, torch.bfloat16):
        y = common.cpu_output((4, 64, 128, 128), dtype)
        assert y.shape == (4, 64, 128, 128) and y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.fill_(3)
        assert (y + 1).sum(dtype=torch.float64).item() == 4 * y.numel()


def test_memory_is_reused_and_never_shared():
    gc.collect()
    _native.module().release_buffers()
    most = common.cpu_output((32, 64, 128, 128), torch.float32)  # an eighth of what was in use at once is kept
    a, b = common.cpu_output(SHAPE, torch.float32), common.cpu_output(SHAPE, torch.float32)
    a.fill_(1), b.fill_(2)
    assert a.data_ptr() != b.data_ptr() and a.unique().item() == 1
    place = a.data_ptr()
    view = a[:, 3]  # as autograd's saved tensors, it keeps the storage
    del a
    c = common.cpu_output(SHAPE, torch.float32)
    assert c.data_ptr() != place and view.unique().item() == 1
    del view
    d = common.cpu_output(SHAPE, torch.float32)
    assert d.data_ptr() == place and d.unique().item() == 1, "fresh memory, not what was kept"
    assert len({t.data_ptr() for t in (b, c, d, most)}) == 4


def test_what_is_kept_is_bounded_and_given_back():
    gc.collect()
    native = _native.module()
    native.release_buffers()
    before = native.buffers_in_use()
    first = common.cpu_output(SHAPE, torch.float32)
    size = native.buffers_in_use() - before
    assert 8 << 20 <= size <= 10 << 20
    del first
    assert native.buffers_in_use() == before
    # An eighth of the highest use is kept at most.
    large = common.cpu_output((8, 64, 128, 128), torch.float32)
    del large
    assert native.release_buffers() <= 5 << 20 and native.release_buffers() == 0


def test_small_outputs_are_torchs():
    native = _native.module()
    before = native.buffers_in_use()
    y = common.cpu_output((1, 8, 16, 16), torch.float32)
    assert native.buffers_in_use() == before and y.is_contiguous(memory_format=torch.channels_last)


def test_a_capsule_nobody_takes_gives_its_memory_back():
    native = _native.module()
    before = native.buffers_in_use()
    capsule = native.buffer(*SHAPE, 0)
    assert native.buffers_in_use() > before
    del capsule
    assert native.buffers_in_use() == before
