"""Bytes the Triton kernels of a network must move, computed from their launches: `python -m resnet_fast.bench.gpu_traffic`.

The network runs on meta tensors; every operator it calls is handed to its triton room, whose launches are recorded. The
bytes of a launch are those of its tensors, each once: what memory must deliver if nothing stays in a cache between
kernels. The floor is what the operators' fusion allows at best. A model, not a measurement.

Beside it stand the bytes of torch's own operators, counted in the same way from what autograd runs on a torchvision model.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_fast import backends
from resnet_fast.bench.gpu_resources import record
from resnet_fast.ops import triton_common
from resnet_fast.ops.conv2d import triton_tiles


def bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of these tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def floor(op: str, door: str, args: tuple[Any, ...], made: list[Tensor], kept: bool = False) -> int:
    """The fewest bytes the operator's fusion allows: every tensor once in each of its passes.

    Args:
        kept: the statistics of the first tensor came with it.
    """
    given = [t for t in args if isinstance(t, Tensor)]
    if door == "fwd" and op in ("bn_act", "bn_act_conv2d") and args[6 if op == "bn_act" else 7]:
        # Statistics, then the apply pass or the convolution; one pass where the statistics came with the tensor.
        return bytes_of(*given, *made) + (0 if kept else bytes_of(args[0]))
    if op == "bn_act" and door == "statistics":
        return bytes_of(*made) + (0 if kept else bytes_of(args[0]))
    if op == "bn_act_max_pool2d" and door == "bwd":  # reduce, then the apply pass, both through the places
        return bytes_of(*given, *made) + (bytes_of(*args[:3]) if args[7] and args[13][0] else 0)
    if (
        op == "bn_act_global_avg_pool2d" and door == "bwd"
    ):  # reduce, then the apply pass, on the masked gradient if written
        again = (args[1], made[3]) if args[9][3] else (*args[:2], args[6])
        return bytes_of(*given, *made) + (bytes_of(*again) if args[7] and args[9][0] else 0)
    if op == "bn_act" and door == "bwd":  # reduce, then the apply pass on the masked gradient where that was written
        dy, x, y = args[:3]
        again = (x, made[3]) if args[10][3] else (x, dy, y)
        return bytes_of(*given, *made) + (bytes_of(*again) if args[7] and args[10][0] else 0)
    if op == "bn_act_conv2d" and door == "bwd":
        # dw from dout and z; dy from dout, its sums with z; then the apply pass.
        (dout, z, *vectors, weight), training, wants = args[:7], args[8], args[14]
        first, apply = any(wants[:3]), training and wants[0]
        inner = first * bytes_of(dout, weight, z) + apply * (bytes_of(z) + bytes_of(z, z))
        return bytes_of(*vectors, *made) + inner + (wants[3] or wants[4]) * bytes_of(dout, z)
    if op == "conv2d" and door == "bwd":
        (dy, x, weight), wants = args[:3], args[8]
        return bytes_of(*made) + wants[0] * bytes_of(dy, weight) + (wants[1] or wants[2]) * bytes_of(dy, x)
    return bytes_of(*given, *made)


@dataclass
class Traffic(TorchDispatchMode):
    """Collects (operator, floor, bytes by the launches) of every door called while the mode is on.

    A composed operator runs whole where its triton room takes it, but by its parts where that is a prologue and
    `prologue` is not set; with it, all are prologues, those too which the room would leave out for time.
    """

    prologue: bool = False
    rows: list[tuple[str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "resnet_fast":
            return func(*args, **(kwargs or {}))
        before = backends.run, backends.run_whole
        backends.run, backends.run_whole = self._run, self._run_whole
        try:  # the operator itself, not its fake: it asks `backends` for its doors
            with torch.utils._python_dispatch._disable_current_modes():
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
        finally:
            backends.run, backends.run_whole = before

    def _run_whole(self, op: str, door: str, parts: Callable[[], Any], *args: Any) -> Any:
        room = importlib.import_module(f"resnet_fast.ops.{op}.triton")
        whole = self.prologue or op != "bn_act_conv2d"
        with triton_common.executor(lambda *launch: None):  # what is asked is not where the tensors are
            whole = whole and room.why_not(door, *args) is None
        return self._run(op, door, *args) if whole else parts()

    def _run(self, op: str, door: str, *args: Any) -> Any:
        room, out = importlib.import_module(f"resnet_fast.ops.{op}.triton"), None

        def call() -> None:
            nonlocal out
            out = getattr(room, door)(*args)

        kept = triton_common.kept_statistics(args[0]) is not None
        with triton_tiles.way("prologue"):
            launches = record(call)
        made = [out] if isinstance(out, Tensor) else list(out)
        self.rows.append(
            (f"{op}.{door}", floor(op, door, args, made, kept), sum(launch.traffic for launch in launches))
        )
        return out

    def total(self) -> tuple[int, int]:
        """(floor, bytes by the launches) of all operators."""
        return sum(r[1] for r in self.rows), sum(r[2] for r in self.rows)


@dataclass
class EagerTraffic(TorchDispatchMode):
    """Adds up the bytes of torch's operators while the mode is on: inputs and outputs, again for every further pass."""

    total: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if func.is_view or name in ("detach", "empty", "empty_like") or not made:
            return out
        self.total += bytes_of(*given, *made)
        if name == "convolution_backward":  # the data gradient and the weight gradient both read dy
            self.total += bytes_of(args[0]) if all(args[-1][:2]) else 0
        elif "batch_norm_backward" in name:  # sums, then dx: dy and x twice
            self.total += bytes_of(*args[:2])
        elif "batch_norm" in name and args[5]:  # statistics, then y
            self.total += bytes_of(args[0])
        return out


def eager(name: str, batch: int, size: int, dtype: torch.dtype, training: bool) -> int:
    """Bytes of a torchvision network's forward, or forward and backward, in plain torch."""
    from resnet_fast.bench import cases

    with torch.device("meta"):
        model = cases.network(name).train(training).to(dtype=dtype, memory_format=torch.channels_last)
        images = torch.empty(batch, 3, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(training), EagerTraffic() as traffic:
        y = model(images)
        if training:
            y.sum().backward()
    return traffic.total


def network(name: str, batch: int, size: int, dtype: torch.dtype, training: bool, prologue: bool = False) -> Traffic:
    """The traffic of a network's forward, or of forward and backward, on images of size x size."""
    from resnet_fast import models

    with torch.device("meta"):
        model = models.create_model(name).train(training).to(dtype=dtype, memory_format=torch.channels_last)
        images = torch.empty(batch, 3, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(training), Traffic(prologue) as traffic:
        y = model(images)
        if training:
            y.sum().backward()
    return traffic


#: Columns of `table`: name, training, prologue; eager ones first of their mode.
COLUMNS = (
    ("infer eager", False),
    ("infer fused", False),
    ("train eager", True),
    ("train fused", True),
    ("train prologue", True),
)


def table(names: Sequence[str], batch: int, size: int, dtype: torch.dtype) -> list[list[str]]:
    """MB of a batch by network: torch's operators, our launches, our launches with the norms as prologues; x eager's."""
    rows = []
    for name in names:
        cells, least = [], 0.0
        for column, training in COLUMNS:
            if column.endswith("eager"):
                least = eager(name, batch, size, dtype, training)
                cells.append(f"{least / 1e6:.0f}")
                continue
            ours = network(name, batch, size, dtype, training, column.endswith("prologue")).total()[1]
            cells.append(f"{ours / 1e6:.0f} ({least / ours:.2f}x less)")
        rows.append([name, *cells])
    return rows


def main() -> None:
    """Print the launches against their floors, for the ImageNet networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rows", type=int, default=0, help="list so many of the doors that exceed their floor most")
    options = parser.parse_args()
    print(
        f"network    pass       dtype      floor MB   launches MB   ratio   (batch {options.batch}, {options.size} px)"
    )
    for name in ("resnet18", "resnet50"):
        for training, prologue in ((False, False), (True, False), (True, True)):
            for dtype in (torch.bfloat16, torch.float32):
                traffic = network(name, options.batch, options.size, dtype, training, prologue)
                least, ours = traffic.total()
                kind = "prologue" if prologue else "training" if training else "inference"
                print(
                    f"{name:10s} {kind:10s} {str(dtype)[6:]:9s} {least / 1e6:9.1f} {ours / 1e6:12.1f} {ours / least:9.3f}"
                )
                for door, low, high in sorted(traffic.rows, key=lambda r: r[1] - r[2])[: options.rows]:
                    print(f"    {door:24s} {low / 1e6:9.2f} {(high - low) / 1e6:+9.2f}")


if __name__ == "__main__":
    main()
