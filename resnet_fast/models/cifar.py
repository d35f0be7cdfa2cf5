"""The 6n + 2 networks for 32-pixel images (He et al. 2015, section 4.2), and their plain twins without shortcuts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.models import common
from resnet_fast.nn import BasicBlock, ConvBNAct, fused
from resnet_fast.nn.blocks import pooled


class PadShortcut(nn.Module):
    """The paper's option A: every stride-th pixel, new channels zero; no parameters.

    Args:
        inplanes, outplanes: channels in and out.
        stride: of the subsampling.
    """

    def __init__(self, inplanes: int, outplanes: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = outplanes - inplanes, stride

    def forward(self, x: Tensor) -> Tensor:
        """x subsampled and padded with zero channels."""
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"stride={self.stride}, zero_channels={self.extra}"


def _pad(inplanes: int, outplanes: int, stride: int, norm: common.Norm) -> nn.Module:
    return PadShortcut(inplanes, outplanes, stride)


SHORTCUTS = {"A": _pad, "B": common.projection}


def _stage_blocks(depth: int) -> int:
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"CIFAR networks have 6n + 2 layers (20, 32, 44, 56, 110, ...), got {depth}")
    return (depth - 2) // 6


class CifarResNet(nn.Module):
    """A residual network for small images: a 3x3 stem and three stages of 16, 32 and 64 channels.

    Args:
        depth: 6n + 2 weighted layers.
        num_classes: the width of the last linear layer.
        shortcut: where the shape changes, "A" (zero padding, no parameters; the paper's choice) or "B" (projection).
        zero_init_residual: start the last norm of every block at zero.
        norm_layer: makes a norm from a channel count; `nn.BatchNorm2d` by default.

    Raises:
        ValueError: a depth that is not 6n + 2, an unknown shortcut.

    Source:
        He et al., Deep Residual Learning for Image Recognition, 2015, section 4.2.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        shortcut: str = "A",
        zero_init_residual: bool = False,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        blocks = _stage_blocks(depth)
        if shortcut not in SHORTCUTS:
            raise ValueError(f'CifarResNet: wanted shortcut "A" or "B", got {shortcut!r}')
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = norm(16)
        self.relu = nn.ReLU(inplace=True)
        stage = common.StageMaker(BasicBlock, 16, norm, shortcut=SHORTCUTS[shortcut])
        self.layer1 = stage(16, blocks)
        self.layer2 = stage(32, blocks, stride=2)
        self.layer3 = stage(64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        common.initialise(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W)."""
        x = fused.conv_bn_act(x, self.conv1, self.bn1)
        x = pooled(self.layer2(self.layer1(x)), self.layer3, self.avgpool)
        return self.fc(torch.flatten(x, 1))


class CifarPlainNet(nn.Module):
    """The same layers without shortcuts: what residual learning is compared with.

    Args:
        depth: 6n + 2 weighted layers.
        num_classes: the width of the last linear layer.

    Raises:
        ValueError: a depth that is not 6n + 2.
    """

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        blocks = _stage_blocks(depth)
        self.stem = ConvBNAct(3, 16, 3)
        planes = 16
        for index, width in enumerate((16, 32, 64), 1):
            stage = nn.Sequential()
            for i in range(2 * blocks):
                stage.append(ConvBNAct(planes, width, 3, stride=2 if index > 1 and i == 0 else 1))
                planes = width
            self.add_module(f"layer{index}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        common.initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W)."""
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet20(**options: Any) -> CifarResNet:
    """The residual network of 20 layers for 32-pixel images; options are `CifarResNet`'s arguments."""
    return CifarResNet(20, **options)


def resnet32(**options: Any) -> CifarResNet:
    """The residual network of 32 layers for 32-pixel images; options are `CifarResNet`'s arguments."""
    return CifarResNet(32, **options)


def resnet44(**options: Any) -> CifarResNet:
    """The residual network of 44 layers for 32-pixel images; options are `CifarResNet`'s arguments."""
    return CifarResNet(44, **options)


def resnet56(**options: Any) -> CifarResNet:
    """The residual network of 56 layers for 32-pixel images; options are `CifarResNet`'s arguments."""
    return CifarResNet(56, **options)


def resnet110(**options: Any) -> CifarResNet:
    """The residual network of 110 layers for 32-pixel images; options are `CifarResNet`'s arguments."""
    return CifarResNet(110, **options)


def resnet1202(**options: Any) -> CifarResNet:
    """The residual network of 1202 layers for 32-pixel images; options are `CifarResNet`'s arguments."""
    return CifarResNet(1202, **options)


def plain20(**options: Any) -> CifarPlainNet:
    """The plain network of 20 layers for 32-pixel images; options are `CifarPlainNet`'s arguments."""
    return CifarPlainNet(20, **options)


def plain32(**options: Any) -> CifarPlainNet:
    """The plain network of 32 layers for 32-pixel images; options are `CifarPlainNet`'s arguments."""
    return CifarPlainNet(32, **options)


def plain44(**options: Any) -> CifarPlainNet:
    """The plain network of 44 layers for 32-pixel images; options are `CifarPlainNet`'s arguments."""
    return CifarPlainNet(44, **options)


def plain56(**options: Any) -> CifarPlainNet:
    """The plain network of 56 layers for 32-pixel images; options are `CifarPlainNet`'s arguments."""
    return CifarPlainNet(56, **options)
