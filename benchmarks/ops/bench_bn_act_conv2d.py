"""bn_act_conv2d, forward and backward, at the inner links of ResNet-50's blocks, batch 2: rooms as chosen, and eager."""

from __future__ import annotations

import pytest
import torch

from resnet_fast import functional, use_backend

LINKS = {  # C, K, H, filter
    "56x56x64-64-3x3": (64, 64, 56, 3),
    "56x56x64-256-1x1": (64, 256, 56, 1),
    "28x28x128-128-3x3": (128, 128, 28, 3),
    "14x14x256-1024-1x1": (256, 1024, 14, 1),
    "7x7x512-512-3x3": (512, 512, 7, 3),
}


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("link", LINKS)
def bench_bn_act_conv2d(benchmark, link: str, backend: str) -> None:
    c, k, h, r = LINKS[link]
    z = torch.randn(2, c, h, h).to(memory_format=torch.channels_last).requires_grad_()
    w = (torch.randn(k, c, r, r) / (c * r * r) ** 0.5).requires_grad_()
    mean, var = torch.zeros(c), torch.ones(c)

    def step() -> tuple[torch.Tensor, ...]:
        out = functional.bn_act_conv2d(z, mean, var, None, None, w, training=True, padding=r // 2)
        return out, *torch.autograd.grad(out, (z, w), out.detach())

    with use_backend("eager"):
        want = step()
    with use_backend(backend):
        for got, truth in zip(step(), want, strict=True):
            if not (got - truth).norm() <= 1e-4 * truth.norm():
                pytest.fail(f"{link} by {backend} is wrong")
        benchmark.pedantic(step, rounds=7, iterations=1, warmup_rounds=2)
