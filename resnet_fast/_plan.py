"""A frozen program run operator by operator: convolutions folded, everything else as the model has it.

For what the one-call network does not take: GPUs, dtypes and modules it does not know, machines without the compiled
module. On CPUs the convolutions are oneDNN's fused ones where torch has them; on GPUs those of conv_bn_act's rooms.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import backends
from resnet_fast.convert import Row
from resnet_fast.nn import fused
from resnet_fast.nn.program import Call, ConvBNAct, MaxPool, Program, Ref, Stem, resolve, scaled
from resnet_fast.ops import common
from resnet_fast.ops.bn_act_max_pool2d.op import pool_window
from resnet_fast.ops.conv_bn_act import onednn
from resnet_fast.ops.recomputed_conv_bn_act.op import Pool


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


class FoldedStem:
    """A folded convolution with ReLU and the max pool behind it, which a room may have in one kernel."""

    def __init__(self, conv: FoldedConv, pool: nn.MaxPool2d) -> None:
        self.conv, self.pool = conv, pool
        k, device = conv.bias.shape[0], conv.bias.device
        # The norm is in the filters: the one that is named to the room leaves everything as it is.
        self.norm = (torch.zeros(k, device=device), torch.ones(k, device=device))

    def __call__(self, x: Tensor) -> Tensor:
        def parts() -> Tensor:
            return fused.max_pool(self.conv(x, None), self.pool)

        if x.dim() != 4:
            return parts()
        padding, stride, dilation, groups = self.conv.where
        window = (list(stride), list(padding), list(dilation))
        shape = common.convolution_shape(x, self.conv.weight, *window)
        given = Pool(*(getattr(self.pool, name) for name in Pool._fields))
        pool = [size for pair in pool_window(x.new_empty(shape, device="meta"), *given) for size in pair]
        norm = (None, self.conv.bias, *self.norm)
        arguments = (x, *(None,) * 4, self.conv.weight, None, *norm, None, False, 1.0, 0.0, True, *window, groups, pool)
        return backends.run_whole("recomputed_conv_bn_act", "fwd", parts, *arguments)


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
        self.stems: dict[Ref, FoldedStem] = {}
        self._join()

    def _join(self) -> None:
        """Make one step of a folded convolution with ReLU and the max pool behind it, its only reader, and of
        squeeze-and-excite's product, the addition and the ReLU."""
        program = self.program
        steps, readers = list(program.steps), Counter(ref for step in self.program.steps for ref in step.reads())
        for step, dead in zip(self.program.steps, self.program.dead):
            if not isinstance(step, MaxPool) or step.x not in self.folded or readers[step.x] > 1 or step.x not in dead:
                continue
            made, pool = next(s for s in steps if s.out == step.x), resolve(self.root, step.pool)
            if made.act == "relu" and made.residual is None and fused.why_not_pool(pool) is None:
                steps[steps.index(step)] = Stem([made], step.pool, step.out)
                steps.remove(made)
                self.stems[step.out] = FoldedStem(self.folded.pop(step.x), pool)
        self.program = replace(program, steps=scaled(steps, program.output))

    def __call__(self, x: Tensor) -> Any:
        values: list[Any] = [None] * self.program.size
        values[0] = common.channels_last(x) if x.dim() == 4 else x
        for step, dead in zip(self.program.steps, self.program.dead):
            conv, stem = self.folded.get(step.out), self.stems.get(step.out)
            if stem is not None:
                values[step.out] = stem(values[step.links[0].x])
            elif conv is None:
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
                stem = self.stems.get(step.out)
                folded = self.folded.get(step.out) if stem is None else stem.conv
                room = "oneDNN" if folded is not None and folded.onednn else "torch"
                if folded is not None and folded.weight.device.type == "cuda":
                    room = "conv_bn_act, the fastest room measured"
                named = step if stem is None else step.links[0]
                paths = (getattr(named, word, None) for word in ("conv", "bn", "pool"))
                name = ".".join(next((path for path in paths if path), ("add_relu",)))
                found.append(Row(name, type(step).__name__, 1 if stem is None else 2, f"by {room}"))
        return found
