"""scale_add_relu by Triton: one pass each way; the factors' gradient is summed beside it, in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.ops import common
from resnet_fast.ops import triton_common as rooms
from resnet_fast.ops.scale_add_relu import eager

LIMIT = 2**31 - 1


def why_not(door: str, first: Tensor, *args: object) -> str | None:
    """float32, bfloat16 or float16 on a GPU (or in the interpreter)."""
    x = first if door == "fwd" else args[0]
    if x[0].numel() > LIMIT:
        return f"the triton room counts an image's values in 32 bits, got {x[0].numel()} of them"
    return rooms.why_not(first, *args[: 2 if door == "fwd" else 3])


def _tiles(x: Tensor) -> tuple[dict[str, int], int, int]:
    """A tile's constants, how many of them lie along an image's rows and along the channels."""
    _, c, h, w = x.shape
    block_r, block_c = rooms.rows_tile(c)
    block_r = min(block_r, max(rooms.next_power_of_2(h * w), 1))
    return dict(C=c, HW=h * w, BLOCK_R=block_r, BLOCK_C=block_c), -(-h * w // block_r), -(-c // block_c)


def fwd(x: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
    """y = relu(x * scale + residual)."""
    from resnet_fast.ops.scale_add_relu.triton_kernels import scale_add_relu_forward

    x, residual = common.channels_last(x), common.channels_last(residual)
    y = common.empty_output(x, eager.dtype(x, scale, residual))
    tile, along, across = _tiles(x)
    args = dict(y_ptr=y, x_ptr=x, scale_ptr=scale.contiguous(), residual_ptr=residual)
    rooms.launch(scale_add_relu_forward, (x.shape[0] * along, across), args, tile | dict(TILES=along))
    return y


def bwd(dy: Tensor, x: Tensor, scale: Tensor, y: Tensor, wants: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dscale, dresidual as far as wanted (empty where not), of y's dtype."""
    from resnet_fast.ops.scale_add_relu.triton_kernels import scale_add_relu_backward, sum_scale_parts

    dy, x, y, scale = *(common.channels_last(t) for t in (dy, x, y)), scale.contiguous()
    n, c = x.shape[:2]
    none = x.new_empty(0)
    dx = common.empty_output(y) if wants[0] else None
    dresidual = common.empty_output(y) if wants[2] else None
    dscale = scale.new_empty(scale.shape, dtype=y.dtype) if wants[1] else None
    if any(wants):
        tile, along, across = _tiles(x)
        # About eight programs for each multiprocessor, of whole tiles; images are never joined.
        steps = max(along // max(8 * rooms.multiprocessors(x.device) // (n * across), 1), 1)
        chunks = -(-along // steps)
        split = chunks > 1 and wants[1]
        sums = x.new_empty(n, chunks, c, dtype=torch.float32) if split else dscale
        args = dict(dx_ptr=dx, sums_ptr=sums, dresidual_ptr=dresidual, dy_ptr=dy, x_ptr=x, scale_ptr=scale, y_ptr=y)
        constants = tile | dict(STEPS=steps, CHUNKS=chunks)
        rooms.launch(scale_add_relu_backward, (n * chunks, across), args, constants)
        if split:
            args = dict(dscale_ptr=dscale, sums_ptr=sums, n=n * c)
            rooms.launch(sum_scale_parts, (-(-n * c // 256),), args, dict(C=c, CHUNKS=chunks, BLOCK=256))
    found = zip((dx, dscale, dresidual), wants)
    return tuple(t if wanted else none.clone() for t, wanted in found)
