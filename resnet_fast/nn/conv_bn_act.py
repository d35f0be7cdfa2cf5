"""ConvBNAct: a convolution, its BatchNorm and ReLU as one module."""

from __future__ import annotations

from torch import Tensor, nn

from resnet_fast.nn import fused


class ConvBNAct(nn.Module):
    """Convolution, BatchNorm and ReLU, run as one operator.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: of the convolution; padding None
            keeps the size at stride 1 (odd filters).
        act: "relu" or None.
        eps, momentum: of the norm.

    Submodules are a plain `torch.nn.Conv2d` (`conv`) and a plain `torch.nn.BatchNorm2d` (`bn`): initialisation, state_dict
    and SyncBatchNorm conversion are torch's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        act: str | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        if padding is None:
            padding = dilation * (kernel_size - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum)
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(bn(conv(x)) + residual)."""
        return fused.conv_bn_act(x, self.conv, self.bn, residual, self.act)

    def extra_repr(self) -> str:
        """The part `conv` and `bn` do not show."""
        return f"act={self.act!r}"
