"""Triton kernel of a strided convolution's data gradient: every residue class of the stride in one launch.

An input pixel meets only the taps of its class (h mod stride, w mod stride): for 3x3 with stride 2 one, two, two or four
of the nine. Each class is a gather of its own (`gather_gemm`) without a wasted tap; a class without taps writes its zeros.
Bytes: dy and the filters read once, dx written once; flops as the forward's.
The idea: the class is the fast axis of the grid. The programs that read the same rows of dy run side by side, so the second
class finds them in the cache, where a launch for each class read dy and the filters again from memory.
Tried and lost by count: those launches (3 reads of dy more, and a fill of dx where a class has no taps).
"""

import triton
import triton.language as tl

from resnet_fast.ops.conv2d.triton_kernels import gather_gemm


@triton.jit
def strided_data_gradient(
    out_ptr, in_ptr, w_ptr, part_ptr, z_ptr, pre_mean_ptr, pre_scale_ptr, pre_shift_ptr, N,
    # as gather_gemm's, whose words these are; of each class (I, J, OH0, OW0, U, V, H0, W0, W_START)
    HI: tl.constexpr, WI: tl.constexpr, CI: tl.constexpr, CG: tl.constexpr,
    HO: tl.constexpr, WO: tl.constexpr, CO: tl.constexpr, NG: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    WG: tl.constexpr, WN: tl.constexpr, WU: tl.constexpr, WV: tl.constexpr, WK: tl.constexpr,
    CLASSES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = len(CLASSES)
    mine = tl.program_id(0) % COUNT
    for i in tl.static_range(COUNT):
        if mine == i:
            gather_gemm(
                out_ptr, in_ptr, w_ptr, None, None, None, part_ptr, z_ptr, pre_mean_ptr, pre_scale_ptr, pre_shift_ptr,
                N * CLASSES[i][0] * CLASSES[i][1],
                HI, WI, CI, CG, HO, WO, CO, NG, CLASSES[i][0], CLASSES[i][1], OH, OW, CLASSES[i][2], CLASSES[i][3],
                CLASSES[i][4], CLASSES[i][5], 1, 1, CLASSES[i][6], CLASSES[i][7], TH, TW,
                WG, WN, CLASSES[i][8], WU, WV, WK, False, 0, 0, False, 1, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, COUNT, FIXED,
            )  # fmt: skip
