"""Times every CUDA kernel against PyTorch and against the bytes it must move. Needs a card; prints a table.

    python tools/cuda_timing.py [--batch 32] [--dtype bfloat16] [--rounds 30] [--csv FILE]

Both are timed alternately on the same tensors, the L2 emptied in between; medians of the rounds. GB/s counts the bytes of
csrc/cuda/README.md, so that 100 % is the card's copy bandwidth (measured first, by a copy of 1 GB).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from resnet_fast import _native
from resnet_fast.ops.add_relu import cuda as add_relu
from resnet_fast.ops.add_relu import eager as add_relu_eager
from resnet_fast.ops.bn_act import cuda as bn_act
from resnet_fast.ops.bn_act import eager as bn_act_eager
from resnet_fast.ops.bn_act_max_pool2d import cuda as stem_end
from resnet_fast.ops.bn_act_max_pool2d import eager as stem_end_eager
from resnet_fast.ops.max_pool2d import cuda as max_pool2d
from resnet_fast.ops.max_pool2d import eager as max_pool2d_eager

SHAPES = [(64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)]
FIELDS = ("kernel", "shape", "us", "torch_us", "times", "gb_per_s", "of_copy")


def seconds(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median time of each call, the calls interleaved, L2 flushed before each."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 3):
        for call, kept in zip(calls, times):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn >= 3:  # the first three warm up
                kept.append(start.elapsed_time(end) / 1e3)
    return [statistics.median(t) for t in times]


def cases(batch: int, dtype: torch.dtype):
    """(name, shape, bytes moved, ours, torch's)."""
    for channels, side in SHAPES:
        x, residual, dy = (
            torch.randn(batch, channels, side, side, device="cuda").to(dtype, memory_format=torch.channels_last)
            for _ in range(3)
        )
        gamma, beta, mean = (torch.randn(channels, device="cuda") for _ in range(3))
        var = torch.rand(channels, device="cuda") + 0.5
        t = x.numel() * x.element_size()
        y = torch.relu(x)

        def both(room, eager, door, *arguments, **extra):
            return (
                lambda: getattr(room, door)(*arguments, **extra),
                lambda: getattr(eager, door)(*arguments),
            )

        shape = f"{batch}x{channels}x{side}x{side}"
        yield "add_relu", shape, 3 * t, *both(add_relu, add_relu_eager, "fwd", x, residual)
        yield "add_relu backward", shape, 3 * t, *both(add_relu, add_relu_eager, "bwd", dy, y)
        inference = (x, gamma, beta, mean, var, residual, False, 1e-5, True)
        yield "bn_act inference", shape, 3 * t, *both(bn_act, bn_act_eager, "fwd", *inference)
        training = (x, gamma, beta, None, None, residual, True, 1e-5, True)
        yield "bn_act training, several", shape, 4 * t, *both(bn_act, bn_act_eager, "fwd", *training, passes=1)
        try:
            bn_act.fwd(*training, passes=2)
        except ValueError:
            pass  # larger than the card's shared memory
        else:
            yield "bn_act training, one pass", shape, 3 * t, *both(bn_act, bn_act_eager, "fwd", *training, passes=2)
        wants = [True, True, True, False]
        backward = (dy, x, None, gamma, beta, mean, var, True, 1e-5, True, wants)
        yield "bn_act backward", shape, 5 * t, *both(bn_act, bn_act_eager, "bwd", *backward)
        if side == 112:
            window = ([3, 3], [2, 2], [1, 1], [1, 1])
            pool = (x, *window, [56, 56], True)
            moved = t + t // 4 + x.numel() // 4
            yield "max_pool2d", shape, moved, *both(max_pool2d, max_pool2d_eager, "fwd", *pool)
            pooled, places = max_pool2d.fwd(*pool)
            back = (torch.randn_like(pooled), places, 112, 112, *window)
            yield "max_pool2d backward", shape, moved, *both(max_pool2d, max_pool2d_eager, "bwd", *back)
            norm = (gamma, beta, mean, var)
            stem = (x, *norm, 1e-5, *window, [56, 56], True)
            yield "bn_act_max_pool2d", shape, moved, *both(stem_end, stem_end_eager, "fwd", *stem)
            pooled, places = stem_end.fwd(*stem)
            back = (torch.randn_like(pooled), places, x, *norm, True, 1e-5, *window, [True] * 3)
            moved += (
                5 * t
            )  # the pool's gather writes the map's gradient, bn_act's two passes read it and x, and write dx
            yield "bn_act_max_pool2d backward", shape, moved, *both(stem_end, stem_end_eager, "bwd", *back)


def main() -> int:
    """Print the table, or say why there is none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    reason = _native.cuda_why_not()
    if reason is not None:
        print(f"nothing to time: {reason}", file=sys.stderr)
        return 2
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    copy = 2 * 2**30 / seconds([source.clone], arguments.rounds)[0]
    print(f"{torch.cuda.get_device_name()}: a copy moves {copy / 1e9:.0f} GB/s")
    rows = []
    for name, shape, moved, ours, torchs in cases(arguments.batch, getattr(torch, arguments.dtype)):
        mine, other = seconds([ours, torchs], arguments.rounds)
        rows.append(
            dict(
                zip(
                    FIELDS,
                    (
                        name,
                        shape,
                        f"{1e6 * mine:.1f}",
                        f"{1e6 * other:.1f}",
                        f"{other / mine:.2f}",
                        f"{moved / mine / 1e9:.0f}",
                        f"{moved / mine / copy:.0%}",
                    ),
                )
            )
        )
        print("  ".join(f"{rows[-1][f]:>{w}}" for f, w in zip(FIELDS, (26, 18, 9, 9, 6, 6, 5))))
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as out:
            writer = csv.DictWriter(out, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
