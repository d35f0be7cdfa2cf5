"""Which operators and rooms exist (the folders say so) and which of them can run on this machine."""

from __future__ import annotations

from pathlib import Path

import torch

from resnet_fast import backends, ops

_FOLDER = Path(ops.__file__).parent

_FLOAT, _HALF = torch.float32, torch.bfloat16
#: The dtypes a room is made for: it may refuse others with a sentence, never these.
MAIN_DTYPES = {
    "eager": (_FLOAT, _HALF, torch.float16, torch.float64),
    "cpu": (_FLOAT, _HALF),
    "onednn": (_FLOAT, _HALF),
    "cudnn": (_FLOAT, _HALF, torch.float16),
    "triton": (_FLOAT, _HALF, torch.float16),
    "cuda": (_FLOAT, _HALF, torch.float16),
}


def operators() -> tuple[str, ...]:
    """The operators' words: every folder with a contract page."""
    return tuple(sorted(p.parent.name for p in _FOLDER.glob("*/op.py")))


def rooms(op: str) -> tuple[str, ...]:
    """The rooms an operator has, whether they can run here or not."""
    return tuple(name for name in reversed(backends.ORDER) if (_FOLDER / op / f"{name}.py").exists())


def cannot_run(op: str, room: str) -> str | None:
    """Why a room of an operator cannot run on this machine at all, None when it can."""
    try:
        return backends.why_not(op, room, *plain_call(op, device(room)))
    except ImportError as error:
        return f"the {room} room of {op} cannot be imported ({error})"


def device(room: str) -> str:
    """Where a room's tensors live."""
    return "cuda" if room in ("cuda", "cudnn", "triton") and torch.cuda.is_available() else "cpu"


def plain_call(op: str, device: str = "cpu") -> tuple[str, tuple]:
    """The door and arguments of a small everyday float32 forward call, which every room that can run here must take."""
    x = torch.randn(2, 16, 8, 8, device=device).to(memory_format=torch.channels_last)
    w = torch.randn(16, 16, 3, 3, device=device)
    vectors = [torch.rand(16, device=device) + 0.5 for _ in range(4)]
    window = ([1, 1], [1, 1], [1, 1], 1)
    return "fwd", {
        "add_relu": (x, x.clone()),
        "bn_act": (x, *vectors[:2], None, None, None, True, 1e-5, True),
        "bn_act_conv2d": (x, *vectors[:2], None, None, w, None, True, 1e-5, *window),
        "bn_act_global_avg_pool2d": (x, *vectors, x.clone(), 1e-5),
        "bn_act_max_pool2d": (x, *vectors, 1e-5, [3, 3], [2, 2], [1, 1], [1, 1], [4, 4], True),
        "conv2d": (x, w, None, *window),
        "conv_bn_act": (x, w, None, *vectors, None, 1e-5, True, *window),
        "recomputed_conv_bn_act": (
            x,
            *vectors[:2],
            None,
            None,
            w,
            None,
            *vectors[2:],
            None,
            None,
            None,
            True,
            1e-5,
            1e-5,
            True,
            *window,
            [],
        ),
        "residual_block": (x, w, None, None, *[None] * 9, [1e-5], [1, 1, 1, 1, 1, 1, 1], [False]),
        "scale_add_relu": (x, torch.rand(2, 16, 1, 1, device=device), x.clone()),
        "max_pool2d": (x, [3, 3], [2, 2], [1, 1], [1, 1], [4, 4], False),
    }[op]
