"""Bytes the Triton kernels of a network must move, computed from their launches: `python -m resnet_fast.bench.gpu_traffic`.

The network runs on meta tensors; every operator it calls is handed to its triton room, whose launches are recorded. The
bytes of a launch are those of its tensors, each once: what memory must deliver if nothing stays in a cache between
kernels. The floor is what the operators' fusion allows at best. A model, not a measurement.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fast import backends
from resnet_fast.bench.gpu_resources import Launch, record


def bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of these tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def launch_bytes(launch: Launch) -> int:
    """Bytes a launch reads and writes; a residue class of a strided data gradient writes only its share of dx."""
    total = launch.traffic
    size = launch.constants
    if launch.name == "gather_gemm" and size["OH"] * size["OW"] > 1:
        out = launch.args["out_ptr"]
        total += launch.args["M"] * size["CO"] * out.element_size() - bytes_of(out)
    return total


def floor(op: str, door: str, args: tuple[Any, ...], made: list[Tensor]) -> int:
    """The fewest bytes the operator's fusion allows: every tensor once in each of its passes."""
    given = [t for t in args if isinstance(t, Tensor)]
    if op == "bn_act" and door == "fwd" and args[6]:  # statistics, then the apply pass
        return bytes_of(*given, *made, args[0])
    if op == "bn_act" and door == "bwd":  # reduce, then the apply pass on the masked gradient where that was written
        dy, x, y = args[:3]
        again = (x, made[3]) if args[10][3] else (x, dy, y)
        return bytes_of(*given, *made) + (bytes_of(*again) if args[7] and args[10][0] else 0)
    if op == "conv2d" and door == "bwd":
        (dy, x, weight), wants = args[:3], args[8]
        return bytes_of(*made) + wants[0] * bytes_of(dy, weight) + (wants[1] or wants[2]) * bytes_of(dy, x)
    return bytes_of(*given, *made)


@dataclass
class Traffic(TorchDispatchMode):
    """Collects (operator, floor, bytes by the launches) of every door called while the mode is on."""

    rows: list[tuple[str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "resnet_fast":
            return func(*args, **(kwargs or {}))
        before, backends.run = backends.run, self._run
        try:  # the operator itself, not its fake: it asks `backends` for its doors
            with torch.utils._python_dispatch._disable_current_modes():
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
        finally:
            backends.run = before

    def _run(self, op: str, door: str, *args: Any) -> Any:
        room, out = importlib.import_module(f"resnet_fast.ops.{op}.triton"), None

        def call() -> None:
            nonlocal out
            out = getattr(room, door)(*args)

        launches = record(call)
        made = [out] if isinstance(out, Tensor) else list(out)
        self.rows.append((f"{op}.{door}", floor(op, door, args, made), sum(map(launch_bytes, launches))))
        return out

    def total(self) -> tuple[int, int]:
        """(floor, bytes by the launches) of all operators."""
        return sum(r[1] for r in self.rows), sum(r[2] for r in self.rows)


def network(name: str, batch: int, size: int, dtype: torch.dtype, training: bool) -> Traffic:
    """The traffic of a network's forward, or of forward and backward, on images of size x size."""
    from resnet_fast import models

    with torch.device("meta"):
        model = models.create_model(name).train(training).to(dtype=dtype, memory_format=torch.channels_last)
        images = torch.empty(batch, 3, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(training), Traffic() as traffic:
        y = model(images)
        if training:
            y.sum().backward()
    return traffic


def main() -> None:
    """Print the table of the ImageNet networks."""
    print("network    pass       dtype      floor MB   launches MB   ratio   (batch 32, 224 x 224)")
    for name in ("resnet18", "resnet50"):
        for training in (False, True):
            for dtype in (torch.bfloat16, torch.float32):
                least, ours = network(name, 32, 224, dtype, training).total()
                kind = "training" if training else "inference"
                print(
                    f"{name:10s} {kind:10s} {str(dtype)[6:]:9s} {least / 1e6:9.1f} {ours / 1e6:12.1f} {ours / least:9.3f}"
                )


if __name__ == "__main__":
    main()
