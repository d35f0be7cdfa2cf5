"""What the Triton rooms share: when they can run, how a kernel is launched, how rows of a [M, C] tensor are cut up.

A room never calls a kernel itself: it hands `launch` the kernel, its grid and its arguments by name. On a GPU that is
Triton's own launch; under TRITON_INTERPRET=1 the interpreter runs on CPU tensors; inside `executor(run)` the given
function runs instead, which is how the compiled kernels are simulated, compiled ahead of time or merely counted.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from resnet_fast import backends

#: What stands in for a launch: (kernel, grid, arguments, constants, warps, stages).
Executor = Callable[[Any, tuple[int, ...], dict[str, Any], dict[str, Any], int, int], None]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_executor: Executor | None = None


@contextmanager
def executor(run: Executor) -> Iterator[None]:
    """Let `run` stand in for every launch of this process while the context lasts; any device's tensors are taken."""
    global _executor
    before, _executor = _executor, run
    backends.forget()
    try:
        yield
    finally:
        _executor = before
        backends.forget()


@functools.cache
def missing() -> str | None:
    """Why Triton cannot be used at all, None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    try:
        import triton  # noqa: F401
    except Exception as error:
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(*tensors: Tensor | None, vectors: tuple[Tensor | None, ...] = ()) -> str | None:
    """Why the Triton room cannot take these activations and per-channel vectors, None when it can."""
    if missing():
        return missing()
    activations = [t for t in tensors if t is not None]
    for t in (*activations, *(v for v in vectors if v is not None)):
        if _executor is None and t.device.type != "cuda" and not (t.device.type == "cpu" and interpreting()):
            return (
                f"the triton room wants CUDA tensors (CPU tensors under TRITON_INTERPRET=1 only), got one on {t.device}"
            )
        if t.dtype not in DTYPES:
            return f"the triton room takes float32, bfloat16 and float16, got {t.dtype}"
    if any(t.numel() == 0 for t in activations):
        return "the triton room leaves empty tensors to eager"
    device = activations[0].device
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"the triton room wants compute capability 8.0 or higher, {torch.cuda.get_device_name(device)} has less"
    return None


def launch(
    kernel: Any, grid: tuple[int, ...], args: dict[str, Any], constants: dict[str, Any], warps: int = 4, stages: int = 3
) -> None:
    """Run a kernel over a grid: on the tensors' device and its current stream, or wherever `executor` says."""
    if _executor is not None:
        _executor(kernel, grid, args, constants, warps, stages)
        return
    device = next(a.device for a in args.values() if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](**args, **constants, num_warps=warps, num_stages=stages)
    else:
        kernel[grid](**args, **constants, num_warps=warps, num_stages=stages)


def keep_statistics(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Let the batch statistics of a fresh tensor, found by the kernel that wrote it, travel with it."""
    if not x.is_inference():  # which has no version
        x._resnet_fast_statistics = (x._version, mean, var)


def kept_statistics(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The statistics that came with this very tensor, None where there are none or it was written to since."""
    version, *found = getattr(x, "_resnet_fast_statistics", (None,))
    # Tensors of their own: two norms of one tensor must not return the same object.
    return (found[0].detach(), found[1].detach()) if found and version == x._version else None


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the grid should fill; an A100's number for tensors without a card."""
    return _multiprocessors(device.index or 0) if device.type == "cuda" else 108


def next_power_of_2(n: int) -> int:
    """The smallest power of two not below n."""
    return 1 << max(n - 1, 0).bit_length()


def rows_tile(c: int, elements: int = 2048, widest: int = 128) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_C): a tile of a [M, C] tensor with whole 128-bit accesses along C where C allows."""
    block_c = min(next_power_of_2(c), widest)
    return max(elements // block_c, 1), block_c


def chunk_rows(m: int, c: int, block_r: int, block_c: int, device: torch.device) -> int:
    """Rows per program of a reduction over rows: about eight programs for each multiprocessor, whole tiles.

    At least 64 rows, which keeps the partial results at a sixteenth of a 16-bit tensor.
    """
    tiles_c = -(-c // block_c)
    wanted = max(8 * multiprocessors(device) // tiles_c, 1)
    rows = max(-(-m // wanted), 64)
    rows = -(-rows // block_r) * block_r
    return min(rows, max((2**31 - 1) // (c * block_r) * block_r, block_r))  # offsets inside a chunk are 32-bit
