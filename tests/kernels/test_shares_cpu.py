"""Shares that even out (csrc/cpu/parallel.h): who computes a piece is chance, what comes out is not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("resnet_fast._C", reason="the compiled module is not there")

from resnet_fast import functional, use_backend
from resnet_fast.ops.recomputed_conv_bn_act.op import Norm
from resnet_fast.ops.residual_block.op import Link


@pytest.fixture(autouse=True)
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def step(x, filters, dy, size):
    """y, the statistics and every gradient of a block with all that loops: 1x1, 3x3 (strided or not), norms, a projection."""
    x, filters = x.clone().requires_grad_(), [w.clone().requires_grad_() for w in filters]
    statistics = [(torch.zeros(len(w)), torch.ones(len(w))) for w in filters]
    vectors = [(torch.ones(len(w)).requires_grad_(), torch.zeros(len(w)).requires_grad_()) for w in filters]
    norms = [Norm(*s, *v, True, 0.1, 1e-5) for s, v in zip(statistics, vectors)]
    strides = (1, size, 1, size)
    links = [Link(w, n, stride, w.shape[-1] // 2) for w, n, stride in zip(filters, norms, strides)]
    with use_backend("cpu"):
        y = functional.residual_block(x, links[:3], links[3])
        y.backward(dy)
    leaves = [x, *filters, *(v for pair in vectors for v in pair)]
    return [y.detach(), *(t for pair in statistics for t in pair), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_whoever_computes(dtype, stride):
    """More threads than cores, so that some are always late and others take what is theirs."""
    x = torch.randn(8, 64, 28, 28).to(dtype).contiguous(memory_format=torch.channels_last)
    shapes = [(64, 64, 1), (64, 64, 3), (256, 64, 1), (256, 64, 1)]
    filters = [torch.randn(k, c, r, r) / (c * r * r) ** 0.5 for k, c, r in shapes]
    dy = torch.randn(8, 256, 28 // stride, 28 // stride).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        torch.set_num_threads(1)
        first = step(x, filters, dy, stride)
        assert not any(t.isnan().any() for t in first)
        for turn in range(12):
            torch.set_num_threads((2, 3, 5, 8)[turn % 4])
            for name, (mine, wanted) in enumerate(zip(step(x, filters, dy, stride), first)):
                assert torch.equal(mine, wanted), (turn, name)
