"""Large outputs of the C++ rooms live in memory that is kept for reuse (csrc/buffers.h)."""

from __future__ import annotations

import gc
import random

import pytest
import torch

import resnet_fast
from resnet_fast import _native, functional
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
    most = common.cpu_output((32, 64, 128, 128), torch.float32)  # as much as was in use at once is kept
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


def test_kept_memory_is_cut_and_joined():
    gc.collect()
    native = _native.module()
    native.release_buffers()
    large = common.cpu_output((4, 64, 128, 128), torch.float32)  # 16 MiB
    begin, end = large.data_ptr(), large.data_ptr() + large.nbytes
    del large
    for first in (True, False):  # two halves, given back in either order, are one block again
        a, b = common.cpu_output(SHAPE, torch.float32), common.cpu_output(SHAPE, torch.float32)
        assert sorted([a.data_ptr(), b.data_ptr()]) == [begin, begin + a.nbytes]
        a.fill_(1), b.fill_(2)
        assert a.unique().item() == 1 and b.unique().item() == 2
        if first:
            del a, b
        else:
            del b, a
        whole = common.cpu_output((4, 64, 128, 128), torch.float32)
        assert (whole.data_ptr(), whole.data_ptr() + whole.nbytes) == (begin, end)
        del whole
    middle = [common.cpu_output((1, 64, 128, 128), torch.float32) for _ in range(4)]  # joined on both sides at once
    del middle[1], middle[2], middle[1]
    assert native.release_buffers() == 12 << 20
    middle[0].fill_(3)
    assert middle[0].unique().item() == 3


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
    # In use and kept together are never much more than was in use at once: what does not fit is given back first.
    other = common.cpu_output((4, 64, 64, 64), torch.float32)
    assert native.buffers_in_use() - before + native.release_buffers() <= size
    del other
    assert native.release_buffers() == 4 << 20 and native.release_buffers() == 0


@pytest.mark.parametrize("spare", [False, True])
def test_what_comes_and_goes_stays_whole_and_bounded(spare):
    """Random sizes: nobody writes into another's, and what is kept beside them is the peak's rest and the spare."""
    gc.collect()
    native = _native.module()
    native.keep_spare(spare)
    try:
        for seed in range(10):
            draw, live, peak = random.Random(seed), [], 0
            native.release_buffers()
            before = native.buffers_in_use()
            for number in range(120):
                if live and draw.random() < 0.45:
                    value, t = live.pop(draw.randrange(len(live)))
                    assert t.unique().tolist() == [value]
                    del t
                else:
                    t = common.cpu_output((1, draw.randint(5, 50), 256, 256), torch.float32)
                    live.append((float(number), t.fill_(number)))
                    del t
                peak = max(peak, native.buffers_in_use() - before)
            assert all(t.unique().tolist() == [value] for value, t in live)
            together = native.buffers_in_use() - before + native.release_buffers()
            whole_page = 2 << 20  # what was asked for is rounded up
            assert together <= peak + whole_page + (min((peak + whole_page) // 16, 24 << 20) if spare else 0)
            live.clear()
    finally:
        native.keep_spare(True)


@pytest.mark.parametrize(("memory", "mapped"), [("default", 0), ("lean", 1)])
def test_convert_says_whether_to_keep_a_spare(memory, mapped):
    """Two halves apart from each other do for no whole: without a spare they are given back for it."""
    native = _native.module()
    resnet_fast.convert(torch.nn.Identity(), memory=memory)
    try:
        gc.collect()
        native.release_buffers()
        tensors = [common.cpu_output((1, 64, 256, 256), torch.float32) for _ in range(24)]
        del tensors[5], tensors[10]  # 16 MB each; a spare of a sixteenth of 384 MB is 24
        whole = common.cpu_output((1, 80, 256, 256), torch.float32)
        kept = native.release_buffers()
        assert (kept < 20 << 20) == bool(mapped), kept
        del tensors, whole
    finally:
        native.keep_spare(True)


def test_large_gradients_are_buffers_with_the_strides_of_their_weights():
    native = _native.module()
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = torch.empty(512, 512, 3, 3).to(memory_format=layout)
        before = native.buffers_in_use()
        dw = common.cpu_gradient(weight)
        assert native.buffers_in_use() - before >= weight.nbytes
        assert dw.shape == weight.shape and dw.stride() == weight.stride() and dw.dtype == torch.float32
        del dw
    small = common.cpu_gradient(torch.empty(64, 64, 3, 3))
    assert small.stride() == (576, 9, 3, 1)


def test_autograd_keeps_a_gradient_buffer_uncopied():
    native = _native.module()
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = torch.randn(512, 512, 3, 3).to(memory_format=layout).requires_grad_()
        x = torch.randn(1, 512, 7, 7).to(memory_format=torch.channels_last)
        gc.collect()
        before = native.buffers_in_use()
        with resnet_fast.use_backend("cpu"):
            functional.conv2d(x, weight, padding=1).sum().backward()
        assert native.buffers_in_use() - before >= weight.nbytes, "the gradient was copied out of its buffer"
        assert weight.grad.stride() == weight.stride()
        weight.grad = None
        assert native.buffers_in_use() == before


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
