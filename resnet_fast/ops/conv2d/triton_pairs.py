"""A convolution on a 16-bit RGB image, seen as one on pairs of pixels, whose copies are wide enough to be asynchronous."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from resnet_fast.ops import common
from resnet_fast.ops import triton_common as rooms

#: Filter rows of at most this many values are one block of GEMM_K (the stem's 7 x 3, or 4 pairs of 2 x 3).
RUN_VALUES = 64


@dataclass(frozen=True)
class Pairs:
    """A convolution of even stride on a 16-bit image of odd channels (RGB), seen as one on pairs of neighbouring pixels.

    A pair of pixels is a multiple of 4 bytes, the narrowest asynchronous copy; single pixels are loaded value by value.
    The image is not copied: only the filters get zeros where a pair reaches over their edge, which is outside the values
    from `first` to `last` of a filter's row.
    """

    lead: int
    taps: int
    first: int
    last: int
    padding: list[int]
    stride: list[int]

    @staticmethod
    def of(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> Pairs | None:
        """How to see this convolution so, None where it cannot or need not be."""
        c, w, s = x.shape[1], x.shape[3], weight.shape[3]
        if x.element_size() != 2 or c % 2 == 0 or w % 2 or stride[1] % 2 or groups != 1 or dilation[1] != 1 or s == 1:
            return None
        start = -(-padding[1] // 2)
        lead = 2 * start - padding[1]
        taps = -(-(lead + s) // 2)
        if taps * 2 * c > RUN_VALUES:
            return None
        return Pairs(lead, taps, lead * c, (lead + s) * c, [padding[0], start], [stride[0], stride[1] // 2])

    def image(self, x: Tensor) -> Tensor:
        """x with neighbouring pixels joined: a view of a channels_last image."""
        n, c, h, w = x.shape
        return common.channels_last(x).permute(0, 2, 3, 1).view(n, h, w // 2, 2 * c).permute(0, 3, 1, 2)

    def filters(self, weight: Tensor) -> Tensor:
        """The filters for that image."""
        from resnet_fast.ops.conv2d.triton_stem import pair_filters

        k, c, r, s = weight.shape
        out = weight.new_empty(k, r, self.taps, 2 * c)
        strides = dict(zip(("STRIDE_K", "STRIDE_C", "STRIDE_R", "STRIDE_S"), weight.stride()))
        constants = dict(C=c, R=r, S=s, LEAD=self.lead, WIDTH=2 * self.taps, BLOCK=512)
        args = dict(out_ptr=out, w_ptr=weight, n=out.numel()) | strides
        rooms.launch(pair_filters, (-(-out.numel() // 512),), args, constants)
        return out.permute(0, 3, 1, 2)

    def gradient(self, dw: Tensor, weight: Tensor) -> Tensor:
        """The filters' gradient out of the joined filters'."""
        k, c, r, s = weight.shape
        columns = dw.permute(0, 2, 3, 1).reshape(k, r, 2 * self.taps, c)
        return columns[:, :, self.lead : self.lead + s].permute(0, 3, 1, 2).contiguous()
