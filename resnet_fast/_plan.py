"""A frozen program run operator by operator: convolutions folded, everything else as the model has it.

For what the one-call network does not take: GPUs, dtypes and modules it does not know, machines without the compiled
module. On CPUs the convolutions are oneDNN's fused ones where torch has them; on GPUs those of conv_bn_act's rooms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import backends
from resnet_fast.convert import Row
from resnet_fast.nn.program import Call, ConvBNAct, Program, Ref, resolve
from resnet_fast.ops import common
from resnet_fast.ops.conv_bn_act import onednn


class FoldedConv:
    """act(conv(x) + residual) with the norm folded into the filters."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: str | None, dtype: torch.dtype) -> None:
        weight, bias = fold(conv, bn)
        self.weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        self.bias = bias.to(dtype)
        self.act = act
        self.where = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        if isinstance(conv.padding, str):
            raise TypeError(f"padding {conv.padding!r} is not folded")
        self.packed: Tensor | None = None
        fits = dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu"
        self.onednn = fits and onednn.self_test() is None

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        padding, stride, dilation, groups = self.where
        if x.device.type == "cuda":
            relu, window = self.act == "relu", (list(stride), padding, dilation, groups)
            given = (self.weight, None, None, self.bias, None, None, residual, 0.0, relu)
            return backends.run("conv_bn_act", "fwd", common.channels_last(x), *given, *window)
        if not self.onednn:
            y = torch.nn.functional.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
            if residual is not None:
                y = y.add_(residual)
            return y.relu_() if self.act == "relu" else y
        if self.packed is None:
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            self.packed = reorder(self.weight, padding, stride, dilation, groups, list(x.shape))
        pointwise = torch.ops.mkldnn._convolution_pointwise
        place = (self.packed, self.bias, padding, stride, dilation, groups)
        if residual is None:
            y = pointwise(x, *place, "none", [], "")
        else:
            y = pointwise.binary(x, common.channels_last(residual), *place, "add", 1.0, None, [], "")
        # Not as oneDNN's epilogue, which turns NaN into 0; in place, while y is still near.
        return y.relu_() if self.act == "relu" else y


def fold(conv: nn.Conv2d | None, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Filters and bias of convolution and norm as one convolution, computed in float64.

    Raises:
        ValueError: the norm has no running statistics.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("a BatchNorm without running statistics cannot be folded")
    double = [None if t is None else t.detach().double() for t in (conv.bias, bn.weight, bn.bias)]
    scale, shift = common.scale_shift(*double, bn.running_mean.double(), bn.running_var.double(), bn.eps)
    return conv.weight.detach().double() * scale[:, None, None, None], shift


class FoldedProgram:
    """A traced model with its convolutions folded."""

    def __init__(self, root: nn.Module, program: Program, dtype: torch.dtype) -> None:
        self.root, self.program = root, program
        self.folded: dict[Ref, FoldedConv] = {}
        for step in program.steps:
            if isinstance(step, ConvBNAct) and step.conv is not None:
                conv, bn = resolve(root, step.conv), resolve(root, step.bn)
                if bn.running_mean is not None and not isinstance(conv.padding, str):
                    self.folded[step.out] = FoldedConv(conv, bn, step.act, dtype)
                    conv.weight = None  # the folded copy is the only one left
        root.to(dtype)

    def __call__(self, x: Tensor) -> Any:
        values: list[Any] = [None] * self.program.size
        values[0] = common.channels_last(x) if x.dim() == 4 else x
        for step, dead in zip(self.program.steps, self.program.dead):
            conv = self.folded.get(step.out)
            if conv is None:
                values[step.out] = step.run(self.root, values)
            else:
                values[step.out] = conv(values[step.x], None if step.residual is None else values[step.residual])
            for ref in dead:
                values[ref] = None
        return self.program.result(values)

    def rows(self) -> list[Row]:
        """A row per step."""
        found = []
        for step in self.program.steps:
            if isinstance(step, Call):
                found.append(Row(str(step.target), step.kind, 0, "as the model has it"))
            else:
                folded = self.folded.get(step.out)
                room = "oneDNN" if folded is not None and folded.onednn else "torch"
                if folded is not None and folded.weight.device.type == "cuda":
                    room = "conv_bn_act, the fastest room measured"
                name = ".".join(getattr(step, "conv", None) or getattr(step, "bn", None) or ("add_relu",))
                found.append(Row(name, type(step).__name__, 1, f"by {room}"))
        return found
