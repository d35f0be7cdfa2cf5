"""python -m benchmarks.memory: what a training step keeps and needs, and how long it takes: eager, default and lean.

Bytes of saved tensors are counted; the peak is the resident set a step adds to a process of its own, at its highest, over
what the process had before its first step. Times are medians of interleaved steps in one process.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import time

import torch
from tabulate import tabulate

import resnet_fast

ENGINES = ("eager", "default", "lean")


def make(name: str, engine: str) -> torch.nn.Module:
    """A network of torchvision's, converted or not."""
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().to(memory_format=torch.channels_last)
    return model if engine == "eager" else resnet_fast.convert(model, memory=engine)


def step(model: torch.nn.Module, x: torch.Tensor, target: torch.Tensor, bf16: bool = False) -> None:
    """One step of SGD without momentum."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = torch.nn.functional.cross_entropy(model(x).float(), target)
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad, alpha=1e-3)
            p.grad = None


def saved(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes of the storages autograd keeps, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(s.nbytes() for s in kept.values())


def peak(args: argparse.Namespace, engine: str) -> float:
    """MB of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--model", args.model[0], "--batch", str(args.batch)]
    command += ["--size", str(args.size), "--threads", str(args.threads), "--only", engine]
    # Freed memory goes back to the system: what is resident is what is needed. Rooms are not timed against each other.
    extra = {"RESNET_FAST_TUNE": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | extra, check=True)
    return float(done.stdout)


def peak_here(args: argparse.Namespace) -> float:
    """MB that two steps add to this process at their highest."""
    model = make(args.model[0], args.only)
    x = torch.randn(args.batch, 3, args.size, args.size).to(memory_format=torch.channels_last)
    target = torch.randint(0, 1000, (args.batch,))
    step(model, x[:1].expand(2, -1, -1, -1)[..., :64, :64], target[:1].expand(2))  # libraries and kernels are loaded
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the highest so far is what is resident now
    before = resident("VmRSS")
    for _ in range(2):
        step(model, x, target)
    return resident("VmHWM") - before


def resident(what: str) -> float:
    """MB of this process as Linux counts them: VmRSS now, VmHWM at the highest."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(what)) * 1024 / 1e6


def main() -> None:
    """Print the table, or with --peak the peaks alone, or with --only one engine's peak."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bf16", action="store_true", help="time under autocast to bfloat16")
    parser.add_argument("--peak", action="store_true", help="only the peaks, in MB, an engine a line")
    parser.add_argument("--only", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        print(peak_here(args))
        return
    if args.peak:
        for engine in ENGINES:
            print(engine, f"{peak(args, engine):.1f}")
        return
    rows = []
    for name in args.model:
        rows += table(argparse.Namespace(**vars(args) | {"model": [name]}))
    header = ["model", "engine", "saved MB", "x eager", "peak MB", "x eager", "step ms", "x default"]
    print(tabulate(rows, header, floatfmt=("", "", ".0f", ".3f", ".0f", ".2f", ".0f", ".3f")))


def table(args: argparse.Namespace) -> list[list]:
    """A network's rows."""
    name = args.model[0]
    x = torch.randn(args.batch, 3, args.size, args.size).to(memory_format=torch.channels_last)
    target = torch.randint(0, 1000, (args.batch,))
    models = {engine: make(name, engine) for engine in ENGINES}
    few = x[:2].clone(memory_format=torch.preserve_format)
    kept = {engine: saved(copy.deepcopy(model), few) * args.batch / 2e6 for engine, model in models.items()}
    times: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for turn in range(args.rounds + 2):  # the first two measure the rooms and warm up
        for engine, model in models.items():
            begin = time.perf_counter()
            step(model, x, target, args.bf16)
            if turn > 1:
                times[engine].append(1e3 * (time.perf_counter() - begin))
    peaks = {engine: peak(args, engine) for engine in ENGINES}
    rows = []
    for engine in ENGINES:
        ratio = statistics.median(a / b for a, b in zip(times[engine], times["default"], strict=True))
        here = [kept[engine], kept[engine] / kept["eager"], peaks[engine], peaks[engine] / peaks["eager"]]
        rows.append([name, engine, *here, statistics.median(times[engine]), ratio])
    return rows


if __name__ == "__main__":
    main()
