"""recomputed_conv_bn_act, forward and backward, at the last links of ResNet-50's blocks, batch 2: beside what keeps z."""

from __future__ import annotations

import pytest
import torch

from resnet_fast import functional
from resnet_fast.ops.recomputed_conv_bn_act.op import Norm

LINKS = {  # C, K, H
    "56x56x64-256-1x1": (64, 256, 56),
    "28x28x128-512-1x1": (128, 512, 28),
    "14x14x256-1024-1x1": (256, 1024, 14),
    "7x7x512-2048-1x1": (512, 2048, 7),
}


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("link", LINKS)
def bench_recomputed_conv_bn_act(benchmark, link: str, kept: bool) -> None:
    c, k, h = LINKS[link]
    z = torch.randn(2, c, h, h).to(memory_format=torch.channels_last).requires_grad_()
    w = (torch.randn(k, c, 1, 1) / c**0.5).requires_grad_()
    residual = torch.randn(2, k, h, h).to(memory_format=torch.channels_last).requires_grad_()
    first, last = ([torch.zeros(n), torch.ones(n)] for n in (c, k))

    def step(kept: bool = kept) -> tuple[torch.Tensor, ...]:
        if kept:
            inner = functional.bn_act_conv2d(z, *first, None, None, w, training=True)
            out = functional.bn_act(inner, *last, None, None, residual, training=True)
        else:
            norms = [Norm(*v, None, None, True, 0.1, 1e-5) for v in (last, first)]
            out = functional.recomputed_conv_bn_act(z, w, None, norms[0], residual, before=norms[1])
        return out, *torch.autograd.grad(out, (z, w, residual), out.detach())

    for got, truth in zip(step(), step(True), strict=True):
        if not (got - truth).norm() <= 1e-4 * truth.norm():
            pytest.fail(f"{link} is wrong")
    benchmark.pedantic(step, rounds=7, iterations=1, warmup_rounds=2)
