"""The contract of scale_add_relu: the end of a squeeze-and-excite block."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast import _library, backends
from resnet_fast.ops import checks, common
from resnet_fast.ops.scale_add_relu import eager


def scale_add_relu(x: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
    """The end of a squeeze-and-excite block in one pass: a factor per image and channel, the shortcut, ReLU.

    Shape:
        x, residual: (N, C, H, W) in any memory format, channels_last is native; scale: (N, C, 1, 1). Any floating dtypes,
        which promote as in torch; the output is channels_last.
    Maths:
        y = max(x * scale + residual, 0), NaN kept. With g = dy where not y <= 0, else 0: dx = g scale, dresidual = g,
        dscale = the sum of g x over the pixels of an image.
    Cost:
        Two reads and one write of the map (torch: five reads, three writes); backward three reads and two writes. Saved
        for backward: x, scale, y; the product is not.
    Raises:
        RuntimeError: x is not four-dimensional, scale or residual of another shape, tensors on different devices.
        NotImplementedError: a dtype that is not floating.
    Source:
        Hu et al., Squeeze-and-Excitation Networks, 2018, figure 3.
    """
    common.check_4d("scale_add_relu", "x", x)
    checks.residual_like(residual, x.shape, "scale_add_relu")
    if scale.shape != (*x.shape[:2], 1, 1):
        raise RuntimeError(
            f"scale_add_relu: wanted scale of shape {(*x.shape[:2], 1, 1)}, a factor per image and channel, got "
            f"{tuple(scale.shape)}"
        )
    common.check_floating("scale_add_relu", "scale", scale)
    common.check_same_device("scale_add_relu", x=x, scale=scale, residual=residual)
    return _forward(x, scale, residual)


def _run(x: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
    def parts() -> Tensor:
        return backends.run("add_relu", "fwd", x * scale, residual)

    return backends.run_whole("scale_add_relu", "fwd", parts, x, scale, residual)


def _run_backward(dy: Tensor, x: Tensor, scale: Tensor, y: Tensor, wants: list[bool]):
    def parts():
        return eager.gradients(backends.run("add_relu", "bwd", dy, y), x, scale, wants)

    return backends.run_whole("scale_add_relu", "bwd", parts, dy, x, scale, y, wants)


def _fake(x: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
    return common.empty_output(x, eager.dtype(x, scale, residual))


def _fake_backward(dy: Tensor, x: Tensor, scale: Tensor, y: Tensor, wants: list[bool]):
    none = x.new_empty(0)
    return (
        common.empty_output(y) if wants[0] else none,
        scale.new_empty(scale.shape, dtype=y.dtype) if wants[1] else none.clone(),
        common.empty_output(y) if wants[2] else none.clone(),
    )


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2], output)
    ctx.dtypes = [t.dtype for t in inputs]


def _backward(ctx, dy: Tensor):
    x, scale, y = ctx.saved_tensors
    wants = list(ctx.needs_input_grad)
    # A graph of the gradient is wanted: torch's own operators can be differentiated again, ours cannot.
    formula = eager.bwd if torch.is_grad_enabled() else _gradient
    dx, dscale, dresidual = formula(dy, x, scale, y, wants)
    return (
        common.like_input(dx, x).to(ctx.dtypes[0]) if wants[0] else None,
        dscale.to(ctx.dtypes[1]) if wants[1] else None,
        dresidual.to(ctx.dtypes[2]) if wants[2] else None,
    )


_forward = _library.compose(
    "scale_add_relu", "(Tensor x, Tensor scale, Tensor residual) -> Tensor", run=_run, fake=_fake
)
_gradient = _library.compose(
    "scale_add_relu_backward",
    "(Tensor dy, Tensor x, Tensor scale, Tensor y, bool[3] wants) -> (Tensor, Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
)
_library.autograd("scale_add_relu", _setup, _backward)
