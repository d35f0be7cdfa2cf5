"""The tolerance law, and random inputs: an error of at most twice eager's own in the same dtype, plus one rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops.bn_act import eager

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def images(n, c, h, w, dtype=torch.float32, scale=1.0, shift=0.0, seed=0) -> Tensor:
    """Random channels_last images."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, h, w, generator=g) * scale + shift
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def vectors(c, seed=0, negative=True) -> tuple[Tensor, Tensor]:
    """gamma (some negative, one zero) and beta."""
    g = torch.Generator().manual_seed(seed + 1000)
    gamma, beta = torch.randn(c, generator=g), torch.randn(c, generator=g)
    if negative and c > 2:
        gamma[c // 2] = 0.0
    return gamma, beta


def assert_lawful(got: Tensor, eager: Tensor, exact: Tensor, what: str = "", size: float | Tensor = 0.0) -> None:
    """Compare with float64: |got - exact| <= 2 max|eager - exact| + one rounding of the dtype, at every element.

    The arithmetic is float32's, and a sum that cancels is rounded at the size of its terms: one such rounding of `size`.
    """
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(exact.shape)}"
    assert got.dtype == eager.dtype, f"{what}: dtype {got.dtype}, wanted {eager.dtype}"
    assert torch.equal(got.isnan(), exact.isnan()), f"{what}: NaN in other places than in float64"
    if got.numel() == 0:
        return
    one_rounding = torch.finfo(got.dtype).eps * exact.abs() + torch.finfo(torch.float32).eps * size
    one_rounding = one_rounding + torch.finfo(got.dtype).smallest_normal
    allowed = 2 * (eager.double() - exact).abs().nan_to_num(0.0).max() + one_rounding
    error = (got.double() - exact).abs().nan_to_num(0.0)
    worst = (error - allowed.nan_to_num(0.0)).argmax()
    assert (error <= allowed.nan_to_num(0.0)).all(), (
        f"{what}: error {error.flatten()[worst]:.3e}, allowed {allowed.flatten()[worst]:.3e}"
    )


def assert_training_lawful(got: tuple[Tensor, Tensor, Tensor], arguments: tuple) -> None:
    """y, mean and biased variance of bn_act with the batch's statistics, whatever the mean: var to 1e-5 of itself."""
    double = tuple(a.double() if isinstance(a, Tensor) else a for a in arguments)
    (y, mean, var), spec, exact = got, eager.fwd(*arguments), eager.fwd(*double)
    assert_lawful(y, spec[0], exact[0], "y", size=float(exact[0].abs().max()))
    assert_lawful(mean, spec[1], exact[1], "mean", size=float(arguments[0].abs().max()))
    assert ((var.double() - exact[2]).abs() <= 1e-5 * exact[2]).all(), "var"
