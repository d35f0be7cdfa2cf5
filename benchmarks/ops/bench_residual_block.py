"""residual_block, forward and backward, at blocks of ResNet-18 and -50, batch 2: rooms as chosen, and eager."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_fast import functional, use_backend
from resnet_fast.ops.recomputed_conv_bn_act.op import Norm
from resnet_fast.ops.residual_block.op import Link

BLOCKS = {  # C, H, links of (filters, size, stride), whether the shortcut is projected
    "56x56x256-64-64-256": (256, 56, ((64, 1, 1), (64, 3, 1), (256, 1, 1)), False),
    "56x56x256-128-128-512-stride-2": (256, 56, ((128, 1, 1), (128, 3, 2), (512, 1, 1)), True),
    "14x14x1024-256-256-1024": (1024, 14, ((256, 1, 1), (256, 3, 1), (1024, 1, 1)), False),
    "28x28x128-128-128": (128, 28, ((128, 3, 1), (128, 3, 1)), False),
}


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("block", BLOCKS)
def bench_residual_block(benchmark, block: str, backend: str) -> None:
    c, h, sizes, projects = BLOCKS[block]
    x = torch.randn(2, c, h, h).to(memory_format=torch.channels_last).requires_grad_()

    def link(of: int, k: int, r: int, stride: int) -> Link:
        w = (torch.randn(k, of, r, r) / (of * r * r) ** 0.5).requires_grad_()
        return Link(w, Norm(None, None, None, None, True, 0.1, 1e-5), stride, r // 2)

    links = [link(of, *size) for of, size in zip((c, *(size[0] for size in sizes)), sizes)]
    stride = max(size[2] for size in sizes)
    projection = link(c, sizes[-1][0], 1, stride) if projects else None
    inputs = (x, *(one.weight for one in (*links, projection) if one is not None))

    def step() -> tuple[Tensor, ...]:
        y = functional.residual_block(x, links, projection)
        return y, *torch.autograd.grad(y, inputs, y.detach())

    with use_backend("eager"):
        want = step()
    with use_backend(backend):
        for got, truth in zip(step(), want, strict=True):
            if not (got - truth).norm() <= 1e-3 * truth.norm():  # a ReLU's kink may lie inside
                pytest.fail(f"{block} by {backend} is wrong")
        benchmark.pedantic(step, rounds=7, iterations=1, warmup_rounds=2)
