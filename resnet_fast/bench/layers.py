"""Every step of a frozen network, timed inside it: its rate, its share of this machine's, the algorithm that ran.

A layer alone finds its input in the caches and its filters too; here they are as cold as the network leaves them.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from resnet_fast import _native
from resnet_fast.bench import cases, report, roofline
from resnet_fast.bench.cases import BenchError
from resnet_fast.bench.timer import LAW, WINOGRAD_LAW, relative
from resnet_fast.freeze import Frozen, freeze


def steps(frozen: Frozen, x: Tensor, repeats: int) -> list[dict[str, Any]]:
    """The steps of x's plan with their median milliseconds over `repeats` runs: a dict each, with the layer's name.

    A convolution and the max pool it computes the rows of are one step: the convolution's, with the pool's output.
    """
    plan = frozen.network.plan(x, tune=True)
    out = torch.empty(plan.out_shape, dtype=frozen.dtype)
    layout = 1 if x.is_contiguous(memory_format=torch.channels_last) else 0
    plan.profile(x.data_ptr(), layout, out.data_ptr(), _native.DTYPES[x.dtype], repeats)
    names, found, before = frozen.network.names, [], None
    for step in plan.describe():
        step = {"name": names.get(step["value"], step["op"]), **step}
        if before is not None:
            step = {**before, "name": f"{before['name']}, {step['op']}", "shape": step["shape"], "ms": step["ms"]}
        before = step if step["ms"] is None and step["fused"] else None
        if step["ms"] is not None:
            found.append(step)
    return found


def check(model: nn.Module, frozen: Frozen, x: Tensor) -> tuple[float, float]:
    """The frozen network's error against float64, and what is allowed: a multiple of eager's own in the same dtype."""
    with torch.inference_mode():
        exact = model.double()(x.double())
        eager = model.to(frozen.dtype)(x.to(frozen.dtype))
        model.float()
        winograd = frozen.dtype == torch.float32 and not frozen.exact
        allowed = (WINOGRAD_LAW if winograd else LAW) * relative(eager, exact) + torch.finfo(frozen.dtype).eps / 2
        return relative(frozen(x), exact), allowed


def row(step: dict[str, Any], size: int, machine: roofline.Machine, gflops: float) -> list[str]:
    """A step's line of the table; `size`: bytes of an element, `gflops`: this machine's rate."""
    n, c, h, w = step["x_shape"]
    _, k, p, q = step["shape"]
    (r, s), groups = step["kernel"], step["groups"]
    shape = f"{h}x{w}x{c} -> {p}x{q}x{k}"
    filters = f"{r}x{s}/{step['stride'][0]}" + (f" g{groups}" if groups > 1 else "")
    filters = filters if step["op"] in ("conv", "linear", "max_pool", "avg_pool") else ""
    seconds = step["ms"] / 1e3
    moved = size * (n * (h * w * c + p * q * k) + (r * s * c // groups * k if step["flops"] else 0))
    floor = max(step["flops"] / gflops, moved / machine.gbytes) / 1e9
    rate = [f"{step['flops'] / seconds / 1e9:.0f}", f"{100 * step['flops'] / seconds / 1e9 / gflops:.0f}"]
    where = [step["name"], shape, filters, step.get("algorithm", "")]
    return [*where, f"{1e3 * seconds:.3f}", *(rate if step["flops"] else ["", ""]), f"{100 * floor / seconds:.0f}"]


def table(found: list[dict[str, Any]], dtype: torch.dtype, machine: roofline.Machine) -> str:
    """The steps, and what they add up to."""
    size, gflops = dtype.itemsize, machine.gflops[str(dtype)[6:]]
    lines = [row(step, size, machine, gflops) for step in found]
    ms, flops = sum(s["ms"] for s in found), sum(s["flops"] for s in found)
    rate = flops / ms / 1e6
    lines.append(["all", "", "", "", f"{ms:.3f}", f"{rate:.0f}", f"{100 * rate / gflops:.0f}", ""])
    header = ["layer", "input -> output", "filter", "algorithm", "ms", "GFLOP/s", "% peak", "% roof"]
    return tabulate(lines, header, disable_numparse=True, colalign=["left"] * 4 + ["right"] * 4)


def main(args: argparse.Namespace, device: str) -> int:
    """Print the table of each network, batch and dtype.

    Returns:
        1 when a network computed something outside the law (it gets no table), else 0.
    """
    if args.csv or args.json:
        raise BenchError("op prints a table; --csv and --json are for infer, train and suite")
    if device != "cpu":
        raise BenchError(f"op network: a frozen network runs in one call, step by step, on CPUs only, got {device}")
    torch.set_num_threads(args.threads)
    machine = roofline.measure(device, args.dtype, args.threads)
    print(f"{report.device_name(device)}, {args.threads} threads, {machine.gbytes:.1f} GB/s ({machine.how})")
    wrong = 0
    for name, batch, dtype in itertools.product(args.model, args.batch, args.dtype):
        model = cases.calibrated(name, "random", args.size).to(memory_format=torch.channels_last)
        x = cases.images("random", batch, args.size).to(memory_format=torch.channels_last)
        frozen = freeze(model, dtype=getattr(torch, dtype))
        if frozen.network is None:
            raise BenchError(f"--model {name}: not run in one call ({frozen.reason})")
        head = f"\nfrozen {name}, batch {batch}, {dtype}; machine: {machine.gflops[dtype]:.0f} GFLOP/s"
        error, allowed = check(model, frozen, x[: cases.CHECKED])
        if error > allowed:
            wrong += 1
            print(f"{head}\n\nWRONG: error {error:.1e} against float64, allowed {allowed:.1e}")
            continue
        found = steps(frozen, x, 3 * args.rounds)
        print(f"{head}; error {error:.1e} of {allowed:.1e} allowed: ok\n\n{table(found, frozen.dtype, machine)}")
    print(LEGEND)
    return int(wrong > 0)


LEGEND = """
Medians, each step between the steps it runs between, filters packed beforehand. GFLOP/s: those of the direct convolution;
Winograd and Strassen compute fewer, so that % peak can exceed 100. % roof: the longer of computing the direct convolution
and moving input, output and filters once, over the time. Residual, ReLU and a pool behind a convolution are in its step."""
