"""The ImageNet residual networks as one table, with torchvision's constructor arguments and state_dict keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fast.models import common
from resnet_fast.nn import BasicBlock, Bottleneck, fused
from resnet_fast.nn.blocks import pooled


class Architecture(NamedTuple):
    """One row of the table: what tells one network of the family from another."""

    block: type[nn.Module]
    blocks: tuple[int, int, int, int]
    groups: int
    width_per_group: int
    parameters: int


#: He et al. 2015 table 1; Xie et al. 2017 (ResNeXt); Zagoruyko and Komodakis 2016 (wide: inner width doubled).
#: Parameters are counted with 1,000 classes; tests hold every network to its number.
ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture(BasicBlock, (2, 2, 2, 2), 1, 64, 11_689_512),
    "resnet34": Architecture(BasicBlock, (3, 4, 6, 3), 1, 64, 21_797_672),
    "resnet50": Architecture(Bottleneck, (3, 4, 6, 3), 1, 64, 25_557_032),
    "resnet101": Architecture(Bottleneck, (3, 4, 23, 3), 1, 64, 44_549_160),
    "resnet152": Architecture(Bottleneck, (3, 8, 36, 3), 1, 64, 60_192_808),
    "resnext50_32x4d": Architecture(Bottleneck, (3, 4, 6, 3), 32, 4, 25_028_904),
    "resnext101_32x8d": Architecture(Bottleneck, (3, 4, 23, 3), 32, 8, 88_791_336),
    "resnext101_64x4d": Architecture(Bottleneck, (3, 4, 23, 3), 64, 4, 83_455_272),
    "wide_resnet50_2": Architecture(Bottleneck, (3, 4, 6, 3), 1, 128, 68_883_240),
    "wide_resnet101_2": Architecture(Bottleneck, (3, 4, 23, 3), 1, 128, 126_886_696),
}


class ResNet(nn.Module):
    """A residual network for images of about 224 pixels, made of fused blocks.

    Args:
        block: `resnet_fast.nn.BasicBlock` or `resnet_fast.nn.Bottleneck`.
        layers: how many blocks each of the four stages has.
        num_classes: the width of the last linear layer.
        zero_init_residual: start the last BatchNorm of every block at zero, so that each block begins as the identity.
        groups: groups of the 3x3 convolutions (ResNeXt's cardinality).
        width_per_group: the inner width of a Bottleneck per group, in units in which 64 is the plain network.
        replace_stride_with_dilation: for stages 2, 3, 4, whether to dilate instead of striding.
        norm_layer: makes a norm from a channel count; `nn.BatchNorm2d` by default. Blocks fuse what is exactly that and
            run any other norm as it is.

    Module names, construction order and initial distributions are torchvision's: state_dicts load strictly both ways,
    and one seed gives both packages the same weights.

    Raises:
        ValueError: `layers` or `replace_stride_with_dilation` of the wrong length.

    Source:
        He et al., Deep Residual Learning for Image Recognition, 2015; the stride sits on the 3x3 convolution.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        dilate = (False, False, False) if replace_stride_with_dilation is None else tuple(replace_stride_with_dilation)
        if len(layers) != 4:
            raise ValueError(f"ResNet: wanted the block counts of four stages, got {layers!r}")
        if len(dilate) != 3:
            raise ValueError(
                "ResNet: replace_stride_with_dilation wants None or three booleans, for stages 2, 3 and 4, got "
                f"{replace_stride_with_dilation!r}"
            )
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stage = common.StageMaker(block, 64, norm, groups=groups, base_width=width_per_group)
        self.layer1 = stage(64, layers[0])
        self.layer2 = stage(128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = stage(256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = stage(512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        common.initialise(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W)."""
        x = fused.stem(x, [(self.conv1, self.bn1)], self.maxpool)
        x = pooled(self.layer3(self.layer2(self.layer1(x))), self.layer4, self.avgpool)
        return self.fc(torch.flatten(x, 1))


def build(name: str, **options: Any) -> ResNet:
    """The network of a row of `ARCHITECTURES`.

    Args:
        name: the row.
        options: `ResNet`'s arguments but block and layers; the groups and the width that make a ResNeXt or a wide
            network what its name says cannot be changed.

    Raises:
        ValueError: an option that contradicts the name.
    """
    row = ARCHITECTURES[name]
    for key, plain in (("groups", 1), ("width_per_group", 64)):
        fixed = getattr(row, key)
        if options.setdefault(key, fixed) != fixed and fixed != plain:
            raise ValueError(f"{name}: by its name {key} is {fixed}, got {options[key]}; ResNet itself takes any")
    return ResNet(row.block, row.blocks, **options)


def resnet18(**options: Any) -> ResNet:
    """ResNet-18: basic blocks 2-2-2-2; options are `ResNet`'s arguments."""
    return build("resnet18", **options)


def resnet34(**options: Any) -> ResNet:
    """ResNet-34: basic blocks 3-4-6-3; options are `ResNet`'s arguments."""
    return build("resnet34", **options)


def resnet50(**options: Any) -> ResNet:
    """ResNet-50: bottlenecks 3-4-6-3; options are `ResNet`'s arguments."""
    return build("resnet50", **options)


def resnet101(**options: Any) -> ResNet:
    """ResNet-101: bottlenecks 3-4-23-3; options are `ResNet`'s arguments."""
    return build("resnet101", **options)


def resnet152(**options: Any) -> ResNet:
    """ResNet-152: bottlenecks 3-8-36-3; options are `ResNet`'s arguments."""
    return build("resnet152", **options)


def resnext50_32x4d(**options: Any) -> ResNet:
    """ResNeXt-50: 32 groups of width 4; options are `ResNet`'s arguments."""
    return build("resnext50_32x4d", **options)


def resnext101_32x8d(**options: Any) -> ResNet:
    """ResNeXt-101: 32 groups of width 8; options are `ResNet`'s arguments."""
    return build("resnext101_32x8d", **options)


def resnext101_64x4d(**options: Any) -> ResNet:
    """ResNeXt-101: 64 groups of width 4; options are `ResNet`'s arguments."""
    return build("resnext101_64x4d", **options)


def wide_resnet50_2(**options: Any) -> ResNet:
    """Wide ResNet-50: bottlenecks of twice the inner width; options are `ResNet`'s arguments."""
    return build("wide_resnet50_2", **options)


def wide_resnet101_2(**options: Any) -> ResNet:
    """Wide ResNet-101: bottlenecks of twice the inner width; options are `ResNet`'s arguments."""
    return build("wide_resnet101_2", **options)
