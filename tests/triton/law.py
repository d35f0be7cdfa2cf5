"""The tolerance law: an error of at most twice eager's own in the same dtype, plus one rounding of the result."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def within_law(ours: Tensor, eager: Tensor, reference: Tensor, what: str, extra: float = 0.0) -> None:
    """Compare a result and eager's in the same dtype with float64.

    Args:
        extra: an absolute error allowed besides, where eager on a CPU computes in float64 or the kernel in tf32.
    """
    assert ours.shape == reference.shape and ours.dtype == eager.dtype, (what, ours.shape, ours.dtype, eager.dtype)
    ours, reference = ours.double(), reference.double()
    assert torch.equal(ours.isnan(), reference.isnan()), f"{what}: NaN at {int(ours.isnan().sum())} places"
    finite = reference.isfinite()
    assert torch.equal(ours[~finite].nan_to_num(), reference[~finite].nan_to_num()), f"{what}: infinities differ"
    if not bool(finite.any()):
        return
    ours, reference, own = ours[finite], reference[finite], (eager.double()[finite] - reference[finite]).abs().max()
    unit = torch.finfo(eager.dtype).eps / 2
    if eager.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        unit *= 2  # Triton's interpreter truncates where hardware rounds to nearest
    rounding = unit * reference.abs() + torch.finfo(eager.dtype).tiny
    excess = (ours - reference).abs() - (2 * own + rounding + extra)
    assert excess.max() <= 0, f"{what}: error {(ours - reference).abs().max():.3e}, eager's own {own:.3e}"
