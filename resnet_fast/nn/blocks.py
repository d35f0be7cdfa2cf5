"""The residual blocks of He et al. 2015, with torchvision's arguments and state_dict keys, on fused operators."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.fx import Proxy

from resnet_fast.nn import fused


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution."""
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an identity or projection shortcut (ResNet-18 and -34).

    Args:
        inplanes, planes: channels in and out.
        stride: of the first convolution; the shortcut (`downsample`) must follow it.
        downsample: projection of the input, None for the identity; `Sequential(conv1x1, norm)` is fused.
        groups, base_width, dilation: 1, 64 and 1: only Bottleneck has others.
        norm_layer: the norm's constructor (default BatchNorm2d; others run unfused).

    Raises:
        ValueError: groups, base_width or dilation other than these.
    """

    expansion = 1
    memory = "default"  #: what is kept for backward; `convert(model, memory=...)` sets it

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64 or dilation != 1:
            raise ValueError(
                f"BasicBlock: wanted groups=1, base_width=64, dilation=1, got {groups}, {base_width}, {dilation}"
            )
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor, pool: nn.AdaptiveAvgPool2d | None = None) -> Tensor:
        """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), pooled where a pool is given."""
        links = [(self.conv1, self.bn1), (self.conv2, self.bn2)]
        return residual(x, links, self.downsample, self.memory == "lean", pool)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around an identity or projection shortcut (ResNet-50 and deeper, ResNeXt, Wide ResNet).

    The stride is on the 3x3 convolution, as in torchvision.

    Args:
        inplanes, planes: channels in, and out divided by `expansion`.
        stride, groups, dilation: of the 3x3 convolution.
        downsample: projection of the input, None for the identity; `Sequential(conv1x1, norm)` is fused.
        base_width: width of the 3x3 convolution per 64 planes.
        norm_layer: the norm's constructor (default BatchNorm2d; others run unfused).
    """

    expansion = 4
    memory = "default"  #: what is kept for backward; `convert(model, memory=...)` sets it

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor, pool: nn.AdaptiveAvgPool2d | None = None) -> Tensor:
        """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)), pooled where a pool is given."""
        links = [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]
        return residual(x, links, self.downsample, self.memory == "lean", pool)


def pooled(x: Tensor, stage: nn.Sequential, pool: nn.Module) -> Tensor:
    """pool(stage(x)), the end of a network: the last block's addition, ReLU and the pool's mean are one operator.

    Blocks of other classes, hooks and other pools are run as they are.
    """
    plain = not isinstance(x, Proxy) and fused.why_not_plain(stage, nn.Sequential) is None and len(stage) > 0
    if not plain or type(stage[-1]) not in (BasicBlock, Bottleneck):
        return pool(stage(x))
    last = stage[-1]
    if fused.why_not_plain(last, type(last)) is not None or fused.why_not_end(pool) is not None:
        return pool(stage(x))
    for block in stage[:-1]:
        x = block(x)
    return last(x, pool)


def residual(
    x: Tensor, links: fused.Links, downsample: nn.Module | None, lean: bool, pool: nn.AdaptiveAvgPool2d | None
) -> Tensor:
    """A block's forward: fused with its shortcut where that is x itself or a convolution and a norm of it."""
    if downsample is None:
        return fused.block(x, links, None, lean, pool)
    if type(downsample) is nn.Sequential and len(downsample) == 2 and isinstance(downsample[1], nn.BatchNorm2d):
        if fused.why_not_plain(downsample, nn.Sequential) is None:
            return fused.block(x, links, (downsample[0], downsample[1]), lean, pool)
    return fused.chain(x, links, downsample, lean=lean, pool=pool)
