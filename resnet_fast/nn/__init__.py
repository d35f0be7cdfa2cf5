"""Drop-in modules over the fused operators."""

from resnet_fast.nn.blocks import BasicBlock, Bottleneck
from resnet_fast.nn.conv_bn_act import ConvBNAct

__all__ = ["BasicBlock", "Bottleneck", "ConvBNAct"]
