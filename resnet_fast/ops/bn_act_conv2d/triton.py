"""bn_act_conv2d by Triton: the convolutions normalise what they load, so the activation is never in memory."""

from __future__ import annotations

from torch import Tensor

from resnet_fast import backends
from resnet_fast.ops import common
from resnet_fast.ops import triton_common as rooms
from resnet_fast.ops.bn_act import triton as bn_act
from resnet_fast.ops.conv2d import triton as conv
from resnet_fast.ops.conv2d import triton_tiles as tiles

#: Shared memory a weight gradient moves more where its prologue has a mask, as a part of its least time on an A100: the tile,
#: normalised, goes back there to be multiplied (counted by the simulator: 1.33 times the accesses, which bound it).
MASKED = 0.56


def why_not(door: str, *args: object) -> str | None:
    """As conv2d; the norm's vectors in float32, bfloat16 or float16."""
    if door == "bwd":
        dout, z, gamma, beta, mean, var, weight, _, _, _, *window, _ = args
        return rooms.why_not(dout, z, weight, vectors=(gamma, beta, mean, var)) or conv.refuse(
            z, weight, *window, dy=dout
        )
    z, gamma, beta, mean, var, weight, bias, _, _, *window = args
    return rooms.why_not(z, weight, vectors=(gamma, beta, mean, var, bias)) or conv.refuse(z, weight, *window)


def fwd(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    training: bool,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution's output, and in training the batch's mean and biased variance (two empty vectors otherwise)."""
    if training:
        mean, var = bn_act.statistics(z)
    z = common.channels_last(z)
    before = conv.prologue(gamma, beta, mean, var, eps)
    window = (stride, padding, dilation, groups)
    if backends.is_normalised_next():
        out, *found = conv.forward_statistics(z, weight, bias, *window, before)
        rooms.keep_statistics(out, *found)
    else:
        out = common.empty_convolution(z, weight, stride, padding, dilation)
        conv.forward(z, weight, *window, out, dict(shift_ptr=bias) | before, False)
    none = mean.new_empty(0)
    return (out, mean, var) if training else (out, none, none.clone())


def whole_unmeasured(door: str) -> bool:
    """Whether a door is taken without a measurement: backward is, which has the parts' convolutions and fewer bytes.

    Forward is not: its prologue has a mask and no way without.
    """
    return door == "bwd"


def _prologue_pays(dout: Tensor, z: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> bool:
    """Whether dw is faster from z than from y, by counted work: two passes of y against `MASKED`.

    A 1x1 convolution that keeps the map needs no mask: rows beyond the last meet dy's zeros.
    """
    if weight.shape[2:].numel() == 1 and max(stride) == 1 and max(padding) == 0:
        return True
    flops = 2 * dout.numel() * weight[0].numel()
    rate = rooms.multiprocessors(z.device) * (tiles.PEAK_16 if z.element_size() == 2 else tiles.PEAK_16 / 2)
    return 2 * z.numel() * z.element_size() / tiles.BANDWIDTH + tiles.LAUNCH > MASKED * flops / rate


def bwd(
    dout: Tensor,
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: bool,
    training: bool,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dz, dgamma, dbeta, dw, dbias as far as wanted (empty where not).

    The weight gradient normalises z as it loads it, or where that is faster reads y, computed once; the data gradient's
    epilogue reads z and reduces what it stores, or with known statistics stores dz at once.
    """
    dout, z = common.channels_last(dout), common.channels_last(z)
    window, none = (stride, padding, dilation, groups), z.new_empty(0)
    before = conv.prologue(gamma, beta, mean, var, eps)
    dw = none.clone()
    if wants[3]:
        ways = {
            "prologue": lambda: conv.weight_gradient(dout, z, weight, *window, before),
            "stored": lambda: conv.weight_gradient(
                dout, bn_act.fwd(z, gamma, beta, mean, var, None, False, eps, True)[0], weight, *window
            ),
        }
        if not _prologue_pays(dout, z, weight, *window):
            ways = dict(reversed(ways.items()))
        key = f"dw {conv.precision(z)} {z.dtype} {list(z.shape)} {list(weight.shape)} {window}"
        dw = tiles.pick(key, ways, z.device)
    db = dout.sum((0, 2, 3)) if wants[4] else none.clone()
    if not any(wants[:3]):
        return none, none.clone(), none.clone(), dw, db
    sums = wants[1] or wants[2] or training
    dz, part = conv.data_gradient(dout, z, conv.krsc(weight), *window, before, not training, sums)
    dgamma = dbeta = none
    if sums:
        dgamma, dbeta = bn_act.merge_gradients(part, var, eps)
    if wants[0] and training:
        m = z.numel() // z.shape[1]
        dz = bn_act.gradient_apply(dz, z, None, gamma, beta, mean, var, dgamma, dbeta, 1 / m, eps, True)
    return (
        dz if wants[0] else none,
        dgamma if wants[1] else none.clone(),
        dbeta if wants[2] else none.clone(),
        dw,
        db,
    )
