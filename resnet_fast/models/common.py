"""What the residual networks share: stages of blocks, and initial weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from resnet_fast.nn import BasicBlock, Bottleneck

Norm = Callable[[int], nn.Module]


def projection(inplanes: int, outplanes: int, stride: int, norm: Norm) -> nn.Module:
    """The shortcut of a block that changes the shape: a strided 1x1 convolution and a norm (the paper's option B)."""
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride=stride, bias=False), norm(outplanes))


class StageMaker:
    """Makes one stage after the other, carrying the width and the dilation on.

    Args:
        block: the block's class.
        inplanes: channels that enter the first stage.
        norm: makes a norm from a channel count.
        groups, base_width: of every block.
        shortcut: makes the shortcut of a block that changes the shape.
    """

    def __init__(
        self,
        block: type[nn.Module],
        inplanes: int,
        norm: Norm,
        groups: int = 1,
        base_width: int = 64,
        shortcut: Callable[[int, int, int, Norm], nn.Module] = projection,
    ) -> None:
        self.block, self.inplanes, self.norm, self.dilation = block, inplanes, norm, 1
        self.groups, self.base_width, self.shortcut = groups, base_width, shortcut

    def __call__(self, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        """`blocks` blocks; the first one strides, or with `dilate` the later ones dilate instead."""
        outplanes = planes * self.block.expansion
        dilation = self.dilation  # the block at the seam keeps the dilation of the stage before
        if dilate:
            self.dilation, stride = self.dilation * stride, 1
        stage = nn.Sequential()
        for i in range(blocks):
            step = stride if i == 0 else 1
            changes = step != 1 or self.inplanes != outplanes
            # Made before the block: the order of random draws is torchvision's, so one seed gives the same weights.
            shortcut = self.shortcut(self.inplanes, outplanes, step, self.norm) if changes else None
            given = (self.inplanes, planes, step, shortcut, self.groups, self.base_width)
            stage.append(self.block(*given, dilation if i == 0 else self.dilation, self.norm))
            self.inplanes = outplanes
        return stage


def initialise(model: nn.Module, zero_init_residual: bool = False) -> None:
    """He's normal distribution (fan out) for convolutions, ones and zeros for norms.

    Args:
        model: changed in place.
        zero_init_residual: the last norm of every block starts at zero (Goyal et al., 2017).
    """
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.BatchNorm2d | nn.GroupNorm):
            for parameter, value in ((m.weight, 1.0), (m.bias, 0.0)):
                if parameter is not None:
                    nn.init.constant_(parameter, value)
    if zero_init_residual:
        for m in model.modules():
            last = m.bn3 if isinstance(m, Bottleneck) else m.bn2 if isinstance(m, BasicBlock) else None
            if last is not None and getattr(last, "weight", None) is not None:
                nn.init.zeros_(last.weight)
