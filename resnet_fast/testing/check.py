"""The tolerance law: how far from the truth a result may be, measured and never chosen.

The truth is the same computation in float64 on the same numbers. A result may be off by at most twice what plain
PyTorch in the same dtype is off by (in the worse of its two memory formats: both are eager), plus one rounding of the
output's dtype, both in the largest error and in the root of the mean square. Where eager gives NaN or an infinity, so
must we, and nowhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FACTOR = 2.0
DRAWS = 3
#: A quantity of few values (a vector of 3 channels) says little: samples are pooled until there are this many.
ENOUGH = 2048
MOST_SAMPLES = 24
PLENTY = 2**19


def law(
    actual: Tensor | Sequence[Tensor],
    eager: Tensor | Sequence[Tensor],
    reference: Tensor | Sequence[Tensor],
    what: str = "output",
) -> float:
    """Assert the law and return the largest error as a part of what was allowed.

    Args:
        actual: our result, or several results of independent inputs, which are judged together.
        eager: plain PyTorch's, in the same dtype.
        reference: plain PyTorch's in float64.
        what: the quantity's name, for the message.

    Raises:
        AssertionError: another shape or dtype than eager's, NaN or infinities elsewhere, or an error beyond the law.
    """
    triples = list(zip(*(_several(t) for t in (actual, eager, reference)), strict=True))
    ours, theirs = _Error(), _Error()
    scale = _Error()
    dtype = triples[0][0].dtype
    for a, e, r in triples:
        assert a.shape == e.shape, f"{what}: shape {tuple(a.shape)}, eager's is {tuple(e.shape)}"
        assert a.dtype == e.dtype, f"{what}: dtype {a.dtype}, eager's is {e.dtype}"
        finite = _same_nonfinite(a, e, what) & r.isfinite()
        a, e, r = (t.detach().double()[finite] for t in (a, e, r))
        for error, values in ((ours, a - r), (theirs, e - r), (scale, r)):
            error.add(values)
    # In float64 the truth is rounded as well, and eager's error is told from it.
    rounding = torch.finfo(dtype).eps * (1.5 if dtype == torch.float64 else 0.5)
    parts = []
    for name in ("largest", "rms"):
        mine, eagers, size = (getattr(e, name) for e in (ours, theirs, scale))
        allowed = FACTOR * eagers + rounding * size
        parts.append(mine / allowed if allowed else 0.0 if mine == 0 else float("inf"))
        assert mine <= allowed, (
            f"{what} ({dtype}, {scale.count} values, {name} {size:.3g}): {name} error against float64 is {mine:.3g}, "
            f"eager's is {eagers:.3g}, the law allows {allowed:.3g}"
        )
    return max(parts)


def compare(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    make: Callable[[], Mapping[str, Any]],
    wants: Sequence[str] = (),
    kink: Callable[..., Tensor] | None = None,
) -> float:
    """Run both on fresh inputs and hold outputs and gradients to the law; returns the largest part of what was allowed.

    The largest of a few thousand errors is a draw, eager's too: what is systematic breaks the law in every one of `DRAWS`
    draws of fresh inputs, and only that is a failure.

    Args:
        ours, plain: the same signature, keyword arguments as `make` gives them, one tensor (or several, the first of
            which is differentiated).
        make: fresh random inputs.
        wants: the inputs whose gradients are compared.
        kink: what goes into the ReLU. Near 0 its sign is chance in any dtype, so no gradient is sent there.
    """
    for _ in range(DRAWS - 1):
        with contextlib.suppress(AssertionError):
            return _draw(ours, plain, make, wants, kink)
    return _draw(ours, plain, make, wants, kink)


def _draw(ours, plain, make, wants, kink) -> float:
    found: dict[str, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
    narrow = torch.finfo(torch.float32).eps
    for sample in range(MOST_SAMPLES):
        inputs = make()
        exact = {k: v.double() if _floating(v) else v for k, v in inputs.items()}
        weight = _weight(plain, kink, inputs, exact) if wants else None
        mine, truth = run(ours, inputs, wants, weight), run(plain, exact, wants, weight)
        eager = _worse(plain, inputs, wants, weight, truth)
        for name in mine:
            if all(v.dtype == torch.float64 for v in inputs.values() if _floating(v)):
                # The truth is no wider than this: eager's error is told from its float32 one, or from how far its two
                # memory formats are apart.
                single = {k: v.float() if _floating(v) else v for k, v in inputs.items()}
                double = {k: v.double() if _floating(v) else v for k, v in single.items()}
                truth32 = run(plain, double, wants, weight)
                error = _worse(plain, single, wants, weight, truth32)[name] - truth32[name]
                error = error.nan_to_num(0.0, 0.0, 0.0)  # infinities less themselves
                told = truth[name] + error * (torch.finfo(torch.float64).eps / narrow)
                eager[name] = max(told, eager[name], key=lambda t, name=name: _distance(t, truth[name]))
            for place, result in zip(found.setdefault(name, ([], [], [])), (mine, eager, truth), strict=True):
                place.append(result[name])
        sizes = [r.numel() * (sample + 1) for r in mine.values()]
        if min(sizes) >= ENOUGH or max(sizes) >= PLENTY:
            break
    return max(law(*triple, what=name) for name, triple in found.items())


def run(
    function: Callable[..., Any], inputs: Mapping[str, Any], wants: Sequence[str] = (), weight: Tensor | None = None
) -> dict[str, Tensor]:
    """Outputs as "output 0", ... and, for the inputs wanted, "gradient of <name>" for dy = weight."""
    inputs = {k: v.detach().requires_grad_(k in wants) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with torch.set_grad_enabled(bool(wants)):
        outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if wants:
        y = outputs[0]
        dy = torch.linspace(-1, 2, y.numel(), device=y.device).view(y.shape) if weight is None else weight
        dy = dy.to(y.dtype)
        grads = torch.autograd.grad(y, [inputs[k] for k in wants], dy)
        found |= {f"gradient of {k}": g for k, g in zip(wants, grads, strict=True)}
    return found


def _worse(plain, inputs, wants, weight, truth) -> dict[str, Tensor]:
    """Eager's results in the memory format in which it is further from the truth, NCHW or channels_last."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        formatted = _formatted({**inputs, "": weight}, layout)
        found.append(run(plain, {k: formatted[k] for k in inputs}, wants, formatted[""]))
    return {k: max((f[k] for f in found), key=lambda t, k=k: _distance(t, truth[k])) for k in truth}


def _distance(t: Tensor, truth: Tensor) -> float:
    error = (t.double() - truth).abs().nan_to_num(0.0, 0.0)
    return float(error.max()) if error.numel() else 0.0


def _formatted(inputs: Mapping[str, Any], layout: torch.memory_format) -> dict[str, Any]:
    return {
        k: v.contiguous(memory_format=layout) if isinstance(v, Tensor) and v.dim() == 4 else v
        for k, v in inputs.items()
    }


def _weight(plain, kink, inputs, exact) -> Tensor:
    """A random dy that every dtype at hand holds exactly, 0 next to the kink."""
    with torch.no_grad():
        y = plain(**inputs)
        y = y[0] if isinstance(y, (tuple, list)) else y
        dy = torch.randn(y.shape, device=y.device).to(y.dtype)
        if kink is not None and y.numel():
            z = kink(**exact).abs()
            dy = dy * (z > 8 * torch.finfo(y.dtype).eps * z.max())
    return dy


class _Error:
    """The largest and the root mean square of the values added."""

    def __init__(self) -> None:
        self.largest = self.square = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        self.largest = max(self.largest, float(values.abs().max()) if values.numel() else 0.0)
        self.square += float(values.square().sum())
        self.count += values.numel()

    @property
    def rms(self) -> float:
        return (self.square / max(1, self.count)) ** 0.5


def _several(t: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [t] if isinstance(t, Tensor) else t


def _floating(v: Any) -> bool:
    return isinstance(v, Tensor) and v.is_floating_point()


def _same_nonfinite(actual: Tensor, eager: Tensor, what: str) -> Tensor:
    """Where both are finite; NaN and infinities must be in the same places."""
    for name, ours, theirs in (
        ("NaN", actual.isnan(), eager.isnan()),
        ("+inf", actual == float("inf"), eager == float("inf")),
        ("-inf", actual == -float("inf"), eager == -float("inf")),
    ):
        assert torch.equal(ours, theirs), f"{what}: {name} in {int(ours.sum())} places, eager in {int(theirs.sum())}"
    return actual.isfinite()
