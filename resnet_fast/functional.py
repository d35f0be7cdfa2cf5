"""The operators, as functions in torch's argument order. NCHW-shaped tensors in any memory format; channels_last is native."""

from resnet_fast.ops.add_relu.op import add_relu
from resnet_fast.ops.bn_act.op import bn_act
from resnet_fast.ops.bn_act_conv2d.op import bn_act_conv2d
from resnet_fast.ops.bn_act_global_avg_pool2d.op import bn_act_global_avg_pool2d
from resnet_fast.ops.bn_act_max_pool2d.op import bn_act_max_pool2d
from resnet_fast.ops.conv2d.op import conv2d
from resnet_fast.ops.conv_bn_act.op import conv_bn_act
from resnet_fast.ops.max_pool2d.op import max_pool2d
from resnet_fast.ops.recomputed_conv_bn_act.op import recomputed_conv_bn_act
from resnet_fast.ops.residual_block.op import residual_block
from resnet_fast.ops.scale_add_relu.op import scale_add_relu

__all__ = [
    "add_relu",
    "bn_act",
    "bn_act_conv2d",
    "bn_act_global_avg_pool2d",
    "bn_act_max_pool2d",
    "conv2d",
    "conv_bn_act",
    "max_pool2d",
    "recomputed_conv_bn_act",
    "residual_block",
    "scale_add_relu",
]
