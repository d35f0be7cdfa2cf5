"""python -m resnet_fast.info: what is built, what would run here, and why not.

Every operator is called once on small tensors in its eager room, the arguments its rooms would get are kept, and each
room is asked with them. Nothing is measured and nothing is written.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import resnet_fast
from resnet_fast import _choices, _native, backends, functional

#: Every environment variable of the package, with what it does.
VARIABLES = {
    "RESNET_FAST_BACKEND": "run every operator by this backend (" + ", ".join(backends.BACKENDS) + "), or raise",
    "RESNET_FAST_DISABLE": "1: plain torch for every operator",
    "RESNET_FAST_EXACT": "1: direct convolutions only, no Winograd, no Strassen",
    "RESNET_FAST_TUNE": "0: never measure, take the first room that can",
    "RESNET_FAST_CACHE": "folder of the measured choices",
    "RESNET_FAST_ISA": "force the CPU kernels' instruction set (default, avx2, avx512, avx512_bf16)",
    "RESNET_FAST_CUDA": "while building: 0 leaves the CUDA module out, 1 requires it (default: where nvcc is)",
    "RESNET_FAST_CUDA_ARCHS": "while building: its architectures, such as 80;90+PTX",
}

Call = tuple[str, str, tuple[Any, ...]]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def software() -> list[tuple[str, str]]:
    """Names and values of what is installed and built."""
    cuda = "not in this torch"
    if torch.version.cuda:
        cuda = f"{torch.version.cuda}, " + (
            torch.cuda.get_device_name() if torch.cuda.is_available() else "no device here"
        )
    module = _native.why_not() or f"built, runs {_native.isa()}: {_native.module().__file__}"
    return [
        ("resnet_fast", f"{resnet_fast.__version__} in {Path(resnet_fast.__file__).parent}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("triton", _version("triton") + (", interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "")),
        ("cuda", cuda),
        ("processor", f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"),
        ("compiled module", module),
        ("freeze (float32)", _frozen(torch.float32)),
        ("freeze (bfloat16)", _frozen(torch.bfloat16)),
    ]


def _frozen(dtype: torch.dtype) -> str:
    small = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    return resnet_fast.freeze(small, dtype=dtype).reason or "a whole network runs in one call"


@contextmanager
def _collected() -> Iterator[list[Call]]:
    """Note (operator, door, arguments) of every call, all of them run in the eager room."""
    found: list[Call] = []
    run = backends.run

    def noted(op: str, door: str, *args: Any) -> Any:
        found.append((op, door, args))
        return run(op, door, *args)

    backends.run = noted
    try:
        with backends.use_backend("eager"):
            yield found
    finally:
        backends.run = run


def example_calls(device: str, dtype: torch.dtype) -> list[Call]:
    """One call of every door of every public operator, with the very arguments its rooms get."""

    def tensor(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.rand(shape, dtype=kind, device=device).requires_grad_()

    x, residual, weight = tensor(2, 16, 8, 8), tensor(2, 16, 8, 8), tensor(16, 16, 3, 3)
    gamma, beta = tensor(16, kind=torch.float32), tensor(16, kind=torch.float32)
    mean, var = torch.zeros(16, device=device), torch.ones(16, device=device)
    with _collected() as found:
        for y in (
            functional.add_relu(x, residual),
            functional.bn_act(x, mean, var, gamma, beta, training=True),
            functional.conv2d(x, weight, padding=1),
            functional.max_pool2d(x, 3, 2, 1),
            functional.bn_act_max_pool2d(x, mean, var, gamma, beta, 3, 2, 1, training=True),
        ):
            y.sum().backward()
        with torch.no_grad():
            functional.conv_bn_act(x, weight, None, mean, var, gamma, beta, residual, padding=1)
    seen: dict[tuple[str, str], Call] = {}
    for call in found:
        seen.setdefault(call[:2], call)
    return list(seen.values())


def rooms(device: str, dtype: torch.dtype) -> tuple[list[list[str]], list[str]]:
    """The table of operators and rooms, and the sentences of those that cannot.

    Returns:
        Rows (operator, door, one cell per room, what would run), and the distinct reasons, numbered as in the cells.
    """
    reasons: list[str] = []
    rows = []
    for op, door, args in example_calls(device, dtype):
        cells, able = [], []
        for name in backends.ORDER:
            reason = backends.why_not(op, name, door, args)
            if reason is None:
                able.append(name)
                cells.append("yes")
                continue
            if backends.room(op, name) is None:
                cells.append("")
                continue
            if reason not in reasons:
                reasons.append(reason)
            cells.append(f"no ({reasons.index(reason) + 1})")
        rows.append([op, door, *cells, _would_run(op, able)])
    return rows, reasons


def _would_run(op: str, able: list[str]) -> str:
    forced = backends.forced()
    if forced is not None:
        return forced if forced in able else f"error: {forced} was asked for"
    if len(able) == 1:
        return able[0]
    return able[0] if not _choices.measuring() else "the fastest measured"


def choices() -> list[tuple[str, str]]:
    """Where measured choices are kept, and how many there are for this machine."""
    file = _choices.path()
    known = len(_choices._read(file)) if file.exists() else 0
    return [("file", str(file)), ("measured for", _choices.machine()), ("choices", str(known))]


def main(arguments: list[str] | None = None) -> int:
    """Print everything."""
    parser = argparse.ArgumentParser(prog="python -m resnet_fast.info", description=__doc__.split("\n")[0])
    parser.parse_args(arguments)
    print(tabulate(software(), tablefmt="plain"))
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            rows, reasons = rooms(device, dtype)
            print(f"\nOperators on {device}, {str(dtype)[6:]} (blank: there is no such room)\n")
            print(tabulate(rows, ["operator", "door", *backends.ORDER, "would run"]))
            for number, reason in enumerate(reasons, 1):
                print(f"  ({number}) {reason}")
    print("\nMeasured choices\n")
    print(tabulate(choices(), tablefmt="plain"))
    print("\nEnvironment\n")
    print(tabulate([(n, os.environ.get(n, "-"), what) for n, what in VARIABLES.items()], ["variable", "now", "effect"]))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # piped into head
        sys.exit(0)
