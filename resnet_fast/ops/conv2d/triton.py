"""conv2d by Triton: implicit GEMM forward, data gradient by the same kernel, weight gradient by a split reduction."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from resnet_fast import backends
from resnet_fast.ops import common
from resnet_fast.ops import triton_common as rooms
from resnet_fast.ops.conv2d import triton_tiles as tiles
from resnet_fast.ops.conv2d.triton_pairs import RUN_VALUES, Pairs

LIMIT = 2**31 - 1
#: A norm's vectors, as gather_gemm's prologue takes them (beside the epilogue's tensors).
PROLOGUE = ("pre_mean_ptr", "pre_scale_ptr", "pre_shift_ptr")


def why_not(door: str, *args: object) -> str | None:
    """One dtype, float32, bfloat16 or float16, on a GPU (or in the interpreter)."""
    if door == "fwd":
        x, weight, bias, *geometry = args
        return rooms.why_not(x, weight, vectors=(bias,)) or refuse(x, weight, *geometry)
    dy, x, weight, _, *geometry = args
    return rooms.why_not(dy, x, weight) or refuse(x, weight, *geometry[:4], dy=dy)


def refuse(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int, dy: Tensor | None = None) -> str | None:
    """Why this geometry or these dtypes cannot run, None when they can."""
    for t in (weight, dy):
        if t is not None and t.dtype != x.dtype:
            return f"the triton room wants one dtype, got {x.dtype} and {t.dtype}"
    n, k, p, q = common.convolution_shape(x, weight, stride, padding, dilation)
    h, w = x.shape[2:]
    # Offsets inside a tile (128 rows) are 32-bit: the images a tile can touch must stay below 2^31 elements.
    images = 128 // (p * q) + 2
    if max(n * p * q, n * h * w) > LIMIT - 256 or images * max(h * w * x.shape[1], p * q * k) > LIMIT:
        return f"the triton room's 32-bit offsets do not reach over x of shape {tuple(x.shape)}"
    if weight.numel() > LIMIT:
        return f"the triton room's 32-bit offsets do not reach over a weight of shape {tuple(weight.shape)}"
    return None


def precision(x: Tensor) -> str:
    """What torch's own convolution would use for float32 on this device: tf32 where cudnn may, else full precision."""
    if x.dtype == torch.bfloat16 and rooms.interpreting():
        return "interpreted"
    if x.dtype != torch.float32:
        return "ieee"
    newer = getattr(torch.backends.cudnn, "conv", None)  # where it exists, the older flag may refuse to be read
    allowed = torch.backends.cudnn.allow_tf32 if newer is None else newer.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def krsc(weight: Tensor) -> Tensor:
    """The weight with its channels innermost; a copy only where the model is not channels_last."""
    return common.channels_last(weight)


def launch_gather(
    out: Tensor,
    source: Tensor,
    weight: Tensor,
    rows: int,
    geometry: dict[str, int],
    groups: int,
    tile: tiles.Tile,
    epilogue: dict[str, Tensor | None] | None = None,
    relu: bool = False,
    fixed: bool = False,
) -> None:
    """Run `gather_gemm` with a tile; see the kernel for the words of `geometry`."""
    from resnet_fast.ops.conv2d.triton_kernels import gather_gemm, split_finish

    none = dict.fromkeys(("residual_ptr", "scale_ptr", "shift_ptr", "part_ptr", "z_ptr"))
    before = dict.fromkeys(PROLOGUE) | {k: v for k, v in (epilogue or {}).items() if k in PROLOGUE}
    extra = none | {k: v for k, v in (epilogue or {}).items() if k not in PROLOGUE}
    whole = geometry["OH"] == geometry["OW"] == 1  # every pixel of the output is a row
    alone = extra["part_ptr"] is None and extra["z_ptr"] is None  # sums over rows are taken of whole results
    split = tile.split if whole and not geometry["RUN"] and alone else 1
    block_k = rooms.next_power_of_2(geometry["V"] * geometry["CG"]) if geometry["RUN"] else tile.k
    constants = geometry | dict(
        RELU=relu and split == 1, SPLIT=split, PRECISION=precision(source), BLOCK_M=tile.m, BLOCK_N=tile.n,
        BLOCK_K=max(block_k, 16), CLASSES=1, FIXED=fixed,
    )  # fmt: skip
    grid = (-(-rows // tile.m) * -(-geometry["NG"] // tile.n), split, groups)
    args = dict(in_ptr=source, w_ptr=weight, M=rows)
    if split == 1:
        rooms.launch(gather_gemm, grid, dict(out_ptr=out) | args | extra | before, constants, tile.warps, tile.stages)
        return
    part = out.new_empty(split, rows, geometry["CO"], dtype=torch.float32)
    rooms.launch(gather_gemm, grid, dict(out_ptr=part) | args | none | before, constants, tile.warps, tile.stages)
    block_m, block_n = rooms.rows_tile(geometry["CO"], 1024)
    constants = dict(CO=geometry["CO"], RELU=relu, SPLIT=split, BLOCK_M=block_m, BLOCK_N=block_n)
    del extra["z_ptr"]
    args = extra | dict(out_ptr=out, part_ptr=part, M=rows)
    rooms.launch(split_finish, (-(-rows // block_m), -(-geometry["CO"] // block_n)), args, constants)


def _candidates(
    source: Tensor, rows: int, geometry: dict[str, int], groups: int, reduces: bool = False, fixed: bool = False
) -> list[tiles.Tile]:
    eight = geometry["OH"] * geometry["OW"] > 1 or fixed  # warps, for all but the smallest tiles

    def fits(t: tiles.Tile) -> bool:
        # The backward of a norm in the epilogue holds z beside the sums: 128 of them a thread spill 400 to 900 bytes, 64 up to
        # 170 in float32 or where the epilogue finds dz, too.
        most = 16384 if eight else 2048 * t.warps
        return not reduces or t.m * t.n <= (8192 if fixed or source.element_size() == 4 else most)

    ieee = source.dtype == torch.float32 and precision(source) == "ieee"
    sum_length = geometry["U"] * geometry["V"] * geometry["CG"]
    found = tiles.gemm_tiles(
        rows, geometry["NG"], sum_length, geometry["CG"], source.element_size(), ieee,
        rooms.multiprocessors(source.device), groups, tiles.architecture_of(source.device), fits,
    )  # fmt: skip
    if not geometry["RUN"] and not eight:
        return found
    # A run is copied in 4-byte pieces, each with a pointer, and residue classes are four loops in one kernel: more than
    # a large tile of four warps has registers for.
    return [replace(t, warps=8) if t.m * t.n > 4096 else t for t in found]


def forward_geometry(x: Tensor, weight: Tensor, size, stride, padding, dilation, groups: int) -> dict[str, int]:
    """The constants of a forward convolution."""
    (_, c, h, w), (k, cg, r, s) = x.shape, weight.shape
    run = groups == 1 and dilation[1] == 1 and s > 1 and cg < 16 and s * cg <= RUN_VALUES
    return dict(
        HI=h, WI=w, CI=c, CG=cg, HO=size[0], WO=size[1], CO=k, NG=k // groups, I=size[0], J=size[1],
        OH=1, OW=1, OH0=0, OW0=0, U=r, V=s, SH=stride[0], SW=stride[1], H0=-padding[0], W0=-padding[1],
        TH=dilation[0], TW=dilation[1], WG=k // groups * r * s * cg, WN=r * s * cg, W_START=0, WU=s * cg, WV=cg, WK=1,
        RUN=run, RUN_FROM=0, RUN_TO=s * cg,
    )  # fmt: skip


def forward(
    x: Tensor, weight: Tensor, stride, padding, dilation, groups: int, out: Tensor, epilogue, relu, statistics=False
) -> tuple[Tensor, int] | None:
    """out = act(epilogue(conv(x))), or of relu(bn(x)) with the norm's `PROLOGUE` vectors in `epilogue`.

    Returns:
        With `statistics` the mean and squared deviations of every tile's rows, for `bn_act.triton.merge`, and the rows
        of a tile.
    """
    n, _, p, q = out.shape
    prologue = epilogue.get("pre_scale_ptr") is not None
    pairs = None if prologue else Pairs.of(x, weight, stride, padding, dilation, groups)
    if pairs is not None:
        x, weight, stride, padding = pairs.image(x), pairs.filters(weight), pairs.stride, pairs.padding
    x, weight = common.channels_last(x), krsc(weight)
    geometry = forward_geometry(x, weight, (p, q), stride, padding, dilation, groups)
    geometry["RUN"] = geometry["RUN"] and not prologue
    if pairs is not None:
        geometry |= dict(RUN_FROM=pairs.first, RUN_TO=pairs.last)
    rows = n * p * q
    parts = None

    def run(tile: tiles.Tile) -> None:
        nonlocal parts
        given = epilogue
        if statistics:
            part = out.new_empty(2, -(-rows // tile.m), out.shape[1], dtype=torch.float32)
            parts, given = (part, tile.m), epilogue | dict(part_ptr=part)
        launch_gather(out, x, weight, rows, geometry, groups, tile, given, relu)

    given = [k for k, v in epilogue.items() if v is not None]
    key = f"forward {precision(x)} {x.dtype} {rows} {groups} {relu} {statistics} {given} {list(geometry.values())}"
    tiles.choose(key, _candidates(x, rows, geometry, groups), run, x.device)
    return parts


def prologue(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> dict[str, Tensor | None]:
    """The vectors with which `forward` reads relu(bn(x)) where x is in memory."""
    from resnet_fast.ops.conv2d.triton_kernels import norm_vectors

    c = mean.shape[0]
    scale, shift = (mean.new_empty(c, dtype=torch.float32) for _ in range(2))
    args = dict(scale_ptr=scale, shift_ptr=shift, gamma_ptr=gamma, beta_ptr=beta, var_ptr=var, eps=eps, C=c)
    rooms.launch(norm_vectors, (-(-c // 128),), args, dict(BLOCK=128))
    return dict(zip(PROLOGUE, (mean, scale, shift)))


def folded_norm(
    k: int, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm with known statistics behind a convolution of k filters, its bias included."""
    from resnet_fast.ops.conv2d.triton_kernels import fold_norm

    scale, shift = (mean.new_empty(k, dtype=torch.float32) for _ in range(2))
    args = dict(
        scale_ptr=scale, shift_ptr=shift, bias_ptr=bias, gamma_ptr=gamma, beta_ptr=beta, mean_ptr=mean, var_ptr=var,
        eps=eps, K=k,
    )  # fmt: skip
    rooms.launch(fold_norm, (-(-k // 128),), args, dict(BLOCK=128))
    return scale, shift


def forward_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int, before: dict | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution, and mean and biased variance of its (rounded) output per channel without reading it again.

    It saves bn_act's first pass over what is normalised next. `before` is a `prologue`.
    """
    from resnet_fast.ops.bn_act.triton import merge

    out = common.empty_convolution(x, weight, stride, padding, dilation)
    given = dict(shift_ptr=bias) | (before or {})
    part, rows = forward(x, weight, stride, padding, dilation, groups, out, given, False, True)
    return out, *merge(part, out.numel() // out.shape[1], rows)


def fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The convolution's output, channels_last; where a norm follows, with its statistics."""
    if backends.is_normalised_next():
        out, mean, var = forward_statistics(x, weight, bias, stride, padding, dilation, groups)
        rooms.keep_statistics(out, mean, var)
        return out
    out = common.empty_convolution(x, weight, stride, padding, dilation)
    forward(x, weight, stride, padding, dilation, groups, out, dict(shift_ptr=bias), False)
    return out


def _taps(parity: int, size: int, stride: int, padding: int, dilation: int) -> tuple[int, int, int, int, int]:
    """Taps which reach the inputs of one residue class: first tap, distance, number, start and step in the output.

    Input h = parity + stride i meets output p at tap r where p stride = h + padding - r dilation. Within a class these
    r are first, first + distance, ...; each step moves p down by distance dilation / stride.
    """
    distance = stride // math.gcd(stride, dilation)
    first = next((r for r in range(min(distance, size)) if (parity + padding - r * dilation) % stride == 0), None)
    if first is None:
        return 0, 1, 0, 0, 0
    number = -(-(size - first) // distance)
    return first, distance, number, (parity + padding - first * dilation) // stride, -(distance * dilation // stride)


def data_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, stride, padding, dilation, groups: int, before: dict | None = None,
    fixed: bool = False, sums: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dx: one gather per residue class of the stride, so that no tap is multiplied in vain; all classes in one launch.

    Args:
        before: the `prologue` of a norm and ReLU whose input is x: dx is the gradient of what they return, or with `fixed`
            (their statistics are known) of x itself.
        sums: reduce that gradient as the norm's backward does.

    Returns:
        dx, and part[2, chunks, C] for `bn_act.triton.merge_gradients` (None: not asked for).
    """
    (n, c, h, w), (k, cg, r, s) = x.shape, weight.shape
    rows = [_taps(a, r, stride[0], padding[0], dilation[0]) for a in range(min(stride[0], h))]
    columns = [_taps(b, s, stride[1], padding[1], dilation[1]) for b in range(min(stride[1], w))]
    classes = []
    for a, (r0, _, u, p0, _) in enumerate(rows):
        for b, (s0, _, v, q0, _) in enumerate(columns):
            i, j = -(-(h - a) // stride[0]), -(-(w - b) // stride[1])
            classes.append((i, j, a, b, u, v, p0, q0, (r0 * s + s0) * cg))
    # All classes that have taps step alike; the one with most is the first to run.
    classes.sort(key=lambda t: -t[4] * t[5])
    i, j, a, b, u, v, p0, q0, w_start = classes[0]
    (_, dr, _, _, tp), (_, ds, _, _, tq) = rows[a], columns[b]
    dx = common.empty_output(x)
    if u * v == 0:  # the input is smaller than the stride, and no tap reaches it
        return dx.zero_(), dx.new_zeros(2, 1, c, dtype=torch.float32) if sums else None
    sizes = dict(
        HI=dy.shape[2], WI=dy.shape[3], CI=k, CG=k // groups, HO=h, WO=w, CO=c, NG=cg, OH=stride[0], OW=stride[1],
        TH=tp, TW=tq, WG=k // groups * r * s * cg, WN=1, WU=dr * s * cg, WV=ds * cg, WK=r * s * cg,
    )  # fmt: skip
    single = dict(I=i, J=j, OH0=a, OW0=b, U=u, V=v, SH=1, SW=1, H0=p0, W0=q0, W_START=w_start)
    geometry = sizes | single | dict(RUN=False, RUN_FROM=0, RUN_TO=0)

    part = None

    def run(tile: tiles.Tile) -> None:
        nonlocal part
        from resnet_fast.ops.conv2d.triton_dgrad import strided_data_gradient

        chunks = max(-(-n * t[0] * t[1] // tile.m) for t in classes) * len(classes)
        part = dx.new_empty(2, chunks, c, dtype=torch.float32) if sums else None
        epilogue = dict.fromkeys(PROLOGUE) | (before or {}) | dict(part_ptr=part, z_ptr=before and x)
        if len(classes) == 1:
            launch_gather(dx, dy, weight, n * i * j, geometry, groups, tile, epilogue, fixed=fixed)
            return
        blocks = dict(BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=max(tile.k, 16))
        constants = sizes | dict(CLASSES=tuple(classes), PRECISION=precision(x), FIXED=fixed) | blocks
        args = dict(out_ptr=dx, in_ptr=dy, w_ptr=weight, N=n) | epilogue
        grid = (chunks * -(-cg // tile.n), 1, groups)
        rooms.launch(strided_data_gradient, grid, args, constants, tile.warps, tile.stages)

    key = f"data gradient {precision(x)} {x.dtype} {list(x.shape)} {list(weight.shape)} {stride} {padding} {dilation}"
    key += f" {groups}" + (f" before {fixed} {sums}" if before else "")
    tiles.choose(key, _candidates(dy, n * h * w, geometry, groups, before is not None, fixed), run, x.device)
    return dx, part


def weight_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, stride, padding, dilation, groups: int, before: dict | None = None
) -> Tensor:
    """dw, contiguous: partial sums over slices of the pixels, added in a fixed order.

    With the `prologue` of a norm and ReLU in `before` the convolution's input is theirs of x.
    """
    from resnet_fast.ops.conv2d.triton_wgrad import conv_weight_gradient, sum_weight_parts

    pairs = None if before else Pairs.of(x, weight, stride, padding, dilation, groups)
    if pairs is not None:
        image = pairs.image(x)
        filters = weight.new_empty(1).expand(weight.shape[0], image.shape[1], weight.shape[2], pairs.taps)  # a shape
        dw = weight_gradient(dy, image, filters, pairs.stride, pairs.padding, dilation, 1)
        return pairs.gradient(dw, weight)
    (_, c, h, w), (k, cg, r, s) = x.shape, weight.shape
    n, _, p, q = dy.shape
    kg, m = k // groups, n * p * q
    run = not before and groups == 1 and dilation[1] == 1 and s > 1 and cg < 16 and s * cg <= RUN_VALUES
    mode = precision(x)
    ieee = x.dtype == torch.float32 and mode == "ieee"
    x = common.channels_last(x)
    taps = 3 if s == 3 and not run and not ieee else 1
    parts = r if run else r * s // taps
    dw = weight.new_empty(weight.shape)
    columns = s * cg if run else cg
    images = max(LIMIT // (h * w * c) - 2, 1)  # a program's slice of pixels stays within 32-bit offsets
    most = min(images * p * q, LIMIT // k)

    def go(tile: tiles.Tile) -> None:
        rows = -(-min(-(-m // tile.split), most) // tile.k) * tile.k
        split = -(-m // rows)
        part = dw if split == 1 else dw.new_empty(split, dw.numel(), dtype=torch.float32)
        layout = (cg * r * s, 1, r * s) if split == 1 else (cg * r * s, cg, 1)
        constants = dict(
            H=h, W=w, C=c, CG=cg, P=p, Q=q, K=k, KG=kg, R=r, S=s, STRIDE_H=stride[0], STRIDE_W=stride[1],
            PAD_H=padding[0], PAD_W=padding[1], DIL_H=dilation[0], DIL_W=dilation[1],
            DW_K=layout[0], DW_T=layout[1], DW_C=layout[2], RUN=run, TAPS=taps, PRECISION=mode,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        )  # fmt: skip
        grid = (-(-kg // tile.m) * -(-columns // tile.n) * parts, split, groups)
        args = dict(dw_ptr=part, dy_ptr=dy, x_ptr=x, M=m, rows=rows) | dict.fromkeys(PROLOGUE) | (before or {})
        rooms.launch(conv_weight_gradient, grid, args, constants, tile.warps, tile.stages)
        if split > 1:
            args = dict(dw_ptr=dw, part_ptr=part, n=dw.numel(), splits=split)
            rooms.launch(sum_weight_parts, (-(-dw.numel() // 256),), args, dict(CG=cg, RS=r * s, BLOCK=256))

    card = (rooms.multiprocessors(x.device), tiles.architecture_of(x.device))
    options = tiles.wgrad_tiles(kg, columns, m, parts * groups, taps, x.element_size(), ieee, *card, before is not None)
    key = f"wgrad {mode} {x.dtype} {list(x.shape)} {list(weight.shape)} {stride} {padding} {dilation} {groups}"
    tiles.choose(key + (" before" if before else ""), options, go, x.device)
    return dw


def bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw, dbias as far as wanted (empty where not)."""
    dy = common.channels_last(dy)
    geometry = (stride, padding, dilation, groups)
    none = x.new_empty(0)
    return (
        data_gradient(dy, x, krsc(weight), *geometry)[0] if wants[0] else none,
        weight_gradient(dy, x, weight, *geometry) if wants[1] else none.clone(),
        dy.sum((0, 2, 3)) if wants[2] else none.clone(),
    )
